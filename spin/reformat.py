"""Step 0: foreign SFT data -> prompts + ground truth.

Writes ``{split}.parquet`` (and ``test.parquet`` when a test size is given) with the columns

    prompt_id   the row's own id, else a hash of its prompt; unique
    chosen      the whole conversation, ending in the assistant turn to be played

Rows stream through twice: once to rank every prompt by a keyed hash, once to write. The ranks decide the subset and the
test split, so neither depends on the order of the rows. Prompts with one opening (all turns before the first answer) are
never parted between training and test, for the answer to one may stand in the prompt of another. 24 bytes a prompt are
held in memory, some 70 while they are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import run_program
from spin.alignment.data.reformat import ReformatConfig, reformat


def main(arguments: Sequence[str]) -> None:
    reformat(from_arguments(ReformatConfig, arguments, "reformat.py"))


if __name__ == "__main__":
    run_program(main)
