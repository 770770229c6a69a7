"""Step 1.5: fractions of generated responses -> preference parquet.

Gathers the fractions of every split in a folder, checks that each prompt and sample is present exactly once, forms pairs
prompt by prompt, and writes ``{split}_prefs-00000-of-0000N.parquet``; ``{split}_prefs.counts.json`` appears last and marks
the set as complete. Record batches are streamed in constant memory; with ``--wait``, while fractions are still being generated.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import interrupt_on_signals, run_program
from spin.alignment.pairs.config import ConvertConfig
from spin.alignment.pairs.convert import convert


def main(arguments: Sequence[str]) -> None:
    config = from_arguments(ConvertConfig, arguments, "convert_data.py")
    interrupt_on_signals()
    convert(config)


if __name__ == "__main__":
    run_program(main)
