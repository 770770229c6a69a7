"""``python -m spin``."""

from spin.cli import entry_point

entry_point()
