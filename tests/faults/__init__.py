"""Faults: processes killed at any moment, full disks, damaged files, wrong clocks. Short here; `python -m tests.faults` is the long form."""
