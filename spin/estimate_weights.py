"""Step 1.6 (WSPIN): preference parquet -> the same rows with a weight for every response token.

    accelerate launch spin/estimate_weights.py --input_dir pairs --output_dir weights --weighting reverse_dpo \
        --model_plus FORWARD --model_minus REVERSE [--transform exponential --transform_params k=1 mu=1]

Weights are aligned to the stored token ids, the end-of-turn id included. One model is in memory at a time. Log-probs are
stored in ``{output_dir}/.scores`` on the way, so a killed process is simply started again; ``{split}_prefs.weights.json``
appears last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spin.alignment.core.program import interrupt_on_sigterm, run_program
from spin.alignment.token_weights.options import (
    check_options,
    make_accelerator,
    make_limits,
    make_parser,
    open_judges,
    report,
)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    transform, settings = check_options(options)
    interrupt_on_sigterm()
    from spin.alignment.token_weights.estimate import Method, describe, open_splits, weigh_splits
    from spin.alignment.training.run import setup_logging

    method = Method(options.weighting, transform, settings, options.seed, make_limits(options), options.batching)
    *judges, encoder = open_judges(options)
    accelerator = make_accelerator()
    setup_logging(accelerator.is_main_process)
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    splits = open_splits(input_dir, output_dir, method, judges, encoder, options.overwrite)
    accelerator.wait_for_everyone()  # all have looked at the output before the main process replaces it
    if not splits:
        report([f"{output_dir} is complete already"], accelerator)
    weigh_splits(splits, output_dir, method, judges, accelerator)
    if accelerator.is_main_process and options.page:
        from spin.alignment.report.weights_page import write_weights_page

        write_weights_page(Path(options.page), output_dir, encoder, describe(output_dir, method), options.page_rows)
    report(describe(output_dir, method), accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
