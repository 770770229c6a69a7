"""Scores one model on held-out prompts and writes one JSON file.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``temperatures`` maps each temperature to exact, exact_se, identical_rate,
truncation_rate and mean_length (tokens); ``nll`` (nats per token of the ground truth, EOS included), ``nll_sequence`` and its
standard error; ``samples``, the first few prompts with the truth and the responses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.program import interrupt_on_sigterm, run_program
from spin.alignment.evaluation.evaluate import check_options, load_held_out, make_parser, score

if TYPE_CHECKING:
    pass


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    sampling = check_options(options)
    interrupt_on_sigterm()
    from transformers import AutoConfig

    from spin.alignment.core.files import write_json_atomic
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.models.folder import check_model_path, context_length, model_folder

    check_model_path(options.model)
    encoder = ChatEncoder(load_tokenizer(options.model, options.revision, options.trust_remote_code), options.system)
    folder = model_folder(options.model, options.revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    held_out, left_out = load_held_out(options, encoder, context_length(config) or sys.maxsize)
    output_file = Path(options.output_file)
    result = {
        "model": options.model,
        "weights_hash": hash_weights(folder),
        "metric": options.metric,
        "input_dir": options.input_dir,
        "split": options.split,
        "n": len(held_out),
        "left_out": left_out,
        **score(options, sampling, held_out, encoder),
    }
    write_json_atomic(output_file, result)
    exact = ", ".join(f"T={name} {values['exact']:.3f}" for name, values in result["temperatures"].items())
    print(f"{options.model}: {options.metric} {exact}; NLL of the truth {result['nll']:.4f} nats per token")


if __name__ == "__main__":
    run_program(main)
