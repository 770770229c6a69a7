"""Scores one model on held-out prompts; writes a JSON file of averages and a parquet file with every response.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``skipped``, the rows that could not be used, each with ``prompt_id`` and
``reason``; ``temperatures`` maps each temperature to exact, identical_rate, truncation_rate and mean_length (tokens); ``nll``
(nats per token of the ground truth, EOS included) and ``nll_sequence`` (nats per ground truth); each with its standard error
(``_se``) and 95 % interval (``_interval``); ``samples``, the first few prompts with the ground truth and the responses. The
columns of the parquet file are described in docs/data_format.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.flags import from_arguments
from spin.alignment.core.program import interrupt_on_signals, run_program
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.evaluate import evaluate


def main(arguments: Sequence[str]) -> None:
    config = from_arguments(EvaluateConfig, arguments, "evaluate_model.py")
    interrupt_on_signals()
    evaluate(config)


if __name__ == "__main__":
    run_program(main)
