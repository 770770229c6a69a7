"""Tests of what happens when something is wrong: input, settings, files, machines. The long form: ``python -m tests.faults``."""
