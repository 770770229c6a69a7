"""``accelerate launch`` for the programs of a run: it ends when ``spin run`` does, and its workers with it."""

from __future__ import annotations

import runpy
import sys

from spin.alignment.core.program import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.argv[0] = "accelerate"
    runpy.run_module("accelerate.commands.launch", run_name="__main__")
