"""Scores one model on held-out prompts and writes one JSON file.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``temperatures`` maps each temperature to exact, exact_se, identical_rate,
truncation_rate and mean_length (tokens); ``nll`` (nats per token of the ground truth, EOS included), ``nll_sequence`` and its
standard error; ``samples``, the first few prompts with the ground truth and the responses.
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
