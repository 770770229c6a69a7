"""Step 1: prompts -> shards of the model's own responses.

Writes ``{output_dir}/{split}-{data_frac:05d}.parquet`` with the columns of docs/data_format.md: prompt_id, sample_index,
chosen (ground truth), rejected (own response), rejected_token_ids, rejected_finish_reason. Any number of processes on any
number of servers may work on one output folder: they share the prompts out among themselves through lease files, and write
what is finished in parts, each complete or absent, so a killed process is simply started again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spin.alignment.core.program import interrupt_on_sigterm, run_program
from spin.alignment.generation.generate import check_options, generate, known_complete, make_parser, stated_provenance


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    sampling = check_options(options)
    interrupt_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin.alignment.generation import find_backend
    from spin.alignment.generation.fraction_journal import clear_parts
    from spin.alignment.models.folder import check_model_path, model_folder

    check_model_path(options.model, needs_weights=not find_backend(options.backend).needs_server)
    model_dir = model_folder(options.model, options.revision)
    stated = stated_provenance(options, sampling, model_dir)
    if num_prompts := known_complete(options, stated):
        print(f"{options.output_dir} is complete already ({options.split}, fraction {options.data_frac})")
        clear_parts(Path(options.output_dir), options.split, num_prompts, options.frac_len)
        return
    generate(options, sampling, stated, model_dir)


if __name__ == "__main__":
    run_program(main)
