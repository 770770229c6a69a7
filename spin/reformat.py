"""Step 0: foreign SFT data -> prompts + ground truth.

Writes ``{split}.parquet`` (and ``test.parquet`` when a test size is given) with the columns

    prompt_id   the row's own id, else a hash of its prompt; unique
    chosen      the complete conversation, ending with the assistant turn that is the ground truth

Rows are streamed twice: once to rank every prompt by a keyed hash, once to write. The ranks determine the subset and the
test split, so neither depends on the order of the rows. Prompts with the same opening (all turns before the first answer)
are never split between training and test, since the answer to one may appear in the prompt of another. Memory use is
24 bytes per prompt, about 70 while sorting.
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
