"""Step 1.6 (WSPIN): preference parquet -> the same rows with a weight for every response token.

    accelerate launch spin/estimate_weights.py --input_dir pairs --output_dir weights --weighting reverse_dpo \
        --model_plus FORWARD --model_minus REVERSE [--transform exponential --transform_params k=1 mu=1]

Weights are aligned to the stored token ids, including the end-of-turn id. Only one model is in memory at a time. Log-probs are
stored in ``{output_dir}/.scores`` as they are computed, so a killed process can simply be started again;
``{split}_prefs.weights.json`` is written last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import interrupt_on_signals, run_program
from spin.alignment.token_weights.config import WeightsConfig


def main(arguments: Sequence[str]) -> None:
    config = from_arguments(WeightsConfig, arguments, "estimate_weights.py")
    interrupt_on_signals()
    from spin.alignment.report.weights_page import write_weights_page
    from spin.alignment.token_weights.estimate import estimate_weights
    from spin.alignment.training.run import setup_logging

    setup_logging(is_main=os.environ.get("RANK", "0") == "0")
    estimate_weights(config, write_weights_page)


if __name__ == "__main__":
    run_program(main)
