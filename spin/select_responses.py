"""Rejection sampling: fractions of generated responses -> SFT data of the responses that a scorer accepts.

Gathers the fractions of every split in a folder as convert_data.py does, scores every response, and writes ``{split}.parquet``
with a row for each accepted one: ``prompt_id`` (that of the prompt, ``#``, the sample index) and ``chosen``, the conversation
that ends with the response. ``{split}.counts.json`` appears last and marks the split as complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import interrupt_on_signals, run_program
from spin.alignment.pairs.config import SelectConfig
from spin.alignment.pairs.select import select_responses


def main(arguments: Sequence[str]) -> None:
    config = from_arguments(SelectConfig, arguments, "select_responses.py")
    interrupt_on_signals()
    select_responses(config)


if __name__ == "__main__":
    run_program(main)
