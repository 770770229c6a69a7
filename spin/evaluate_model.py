"""Scores one model on held-out prompts; writes a JSON file of averages and a parquet file with every response.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``key``, a hash of everything that the results depend on; ``skipped``, the
rows that could not be used, each with ``prompt_id`` and ``reason``; ``temperatures`` maps each temperature to the averages of its
responses (``evaluation/averages.py``); ``groups``, the same for each value of ``group_by``; ``nll`` (nats per token of the ground
truth, EOS included) and ``nll_sequence`` (nats per ground truth); ``win_rates`` by name of the model compared with
(``evaluation/win_rates.py``); ``tasks``, the benchmarks by name (``evaluation/harness.py``); averages with their standard error
(``_se``) and 95 % interval (``_interval``); ``samples``, the first few prompts with the ground truth and the responses. The
columns of the parquet file are described in docs/data_format.md, and every number in docs/evaluation.md.
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
