"""``python -m benchmarks.gpu bench`` under its earlier name, with the same options."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    runpy.run_module("benchmarks.gpu", run_name="__main__")
