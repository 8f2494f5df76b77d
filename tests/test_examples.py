"""The examples: each runs, in a process of its own, and says and writes what its docstring promises."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from safetensors import safe_open

import crate_mae
from crate_mae.data import FLOWERS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
QUERY = "sunflowers/14266917699_91b207888e.jpg"
"""The photograph that the examples look at, unless told otherwise."""
