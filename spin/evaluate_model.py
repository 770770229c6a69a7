"""Scores one model on held-out prompts and writes one JSON file.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``temperatures`` maps each temperature to exact, exact_se, identical_rate,
truncation_rate and mean_length (tokens); ``nll`` (nats per token of the ground truth, EOS included), ``nll_sequence`` and its
standard error; ``samples``, the first few prompts with the truth and the responses.
"""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.core.program import interrupt_on_sigterm, run_program
from spin.alignment.evaluation.evaluate import check_options, evaluate, make_parser


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    sampling = check_options(options)
    interrupt_on_sigterm()
    result = evaluate(options, sampling)
    exact = ", ".join(f"T={name} {values['exact']:.3f}" for name, values in result["temperatures"].items())
    print(f"{options.model}: {options.metric} {exact}; NLL of the truth {result['nll']:.4f} nats per token")


if __name__ == "__main__":
    run_program(main)
