"""How long each operator takes, beside every peer: ``python -m benchmarks.kernels``."""
