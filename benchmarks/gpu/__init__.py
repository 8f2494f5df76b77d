"""Unattended runs on one GPU: a check of everything that needs one, and the measurements that the table of targets needs.

    python -m benchmarks.gpu check                  # `make gpu-check`: tests, memory checker, a few times; 8 minutes
    python -m benchmarks.gpu bench                  # `make gpu-bench`: measurements, in under nine minutes; then the report
    python -m benchmarks.gpu bench --full           # `make gpu-bench-full`: every sweep, every peer; hours
    python -m benchmarks.gpu bench --only step      # parts with this word in their names
    python -m benchmarks.gpu all                    # `make gpu-all`: kernels compiled, then both, and counters; 25 minutes
    python -m benchmarks.gpu check --dry-run        # list the parts and run none
    python -m benchmarks.gpu check --device cpu     # rehearse the timing parts, tiny, on the composed path

Every part is a process of its own, so that a crash, a lost CUDA context or a hang costs one part and not the run. What a part has
written counts however it ends, and is stored as soon as the part is over. Nothing is installed. Needed are torch, Triton, einops,
NumPy, Pillow, safetensors, tqdm and pytest; tests that need more are skipped. Exit status: 0 everything passed, 1
something did not, 2 there is no CUDA device.

    check.py            the parts of the check, and its JSON file
    bench.py            the parts of the measurement, the most important first
    everything.py       both in pieces, with kernels compiled before them, and counters
    archiving.py        the archive that each command ends with
    parts.py            how a part is run, watched and ended
    pytest_outcomes.py  a pytest plugin that tells every test's outcome as it happens
"""
