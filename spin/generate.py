"""Step 1: prompts -> fractions of the model's own responses.

Writes ``{output_dir}/{split}-{data_frac:05d}.parquet`` with the columns of docs/data_format.md: prompt_id, sample_index,
chosen (ground truth), rejected (own response), rejected_token_ids, rejected_finish_reason. Any number of processes on any
number of machines may work on one output folder: they divide the prompts among themselves through lease files and write
finished prompts in parts, each complete or absent, so a killed process can simply be restarted.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import interrupt_on_signals, run_program
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.generation.generate import generate


def main(arguments: Sequence[str]) -> None:
    config = from_arguments(GenerateConfig, arguments, "generate.py")
    interrupt_on_signals()
    generate(config)


if __name__ == "__main__":
    run_program(main)
