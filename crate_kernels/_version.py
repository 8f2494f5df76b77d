"""The version, written here only: the build reads it without importing torch."""

__version__ = "0.1.0"
