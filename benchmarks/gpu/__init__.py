"""The parts of ``benchmarks/gpu_suite.py``, and the process that each of them runs in."""
