"""Scores one model on held-out prompts and writes one JSON file.

Fields: ``n``, ``metric``, ``model``, ``weights_hash``; ``temperatures`` maps each temperature to exact, exact_se, identical_rate,
truncation_rate and mean_length (tokens); ``nll`` (nats per token of the ground truth, EOS included), ``nll_sequence`` and its
standard error; ``samples``, the first few prompts with the truth and the responses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError, lookup
from spin.alignment.generation.base import SamplingConfig
from spin.programs import Parser, interrupt_on_sigterm, run_program

if TYPE_CHECKING:
    from spin.alignment.chat import ChatEncoder
    from spin.alignment.evaluation import HeldOut


def make_parser() -> Parser:
    parser = Parser(prog="evaluate_model.py", description="Score a model on held-out prompts with ground truth.")
    add = parser.add_argument
    add("--model", required=True, help="model folder or Hub name")
    add("--revision", default=None, help="revision of a Hub model")
    add("--input_dir", required=True, help="prompts with ground truth: folder, file or Hub name")
    add("--split", default="test", help="split of the data")
    add("--output_file", required=True, help="JSON file to write")
    add(
        "--metric",
        default="exact_match",
        help="a rule: exact_match, math_answer, module:function, or a sum (docs/scoring.md)",
    )
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0, 0.5], help="0 is greedy")
    add("--limit", type=int, default=0, help="held-out prompts to use, drawn with a fixed seed (0: all)")
    add("--max_new_tokens", type=int, default=256, help="longest response in tokens")
    add("--backend", default="transformers", help="transformers or vllm")
    add("--batch_size", type=int, default=16, help="prompts at once (transformers)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs of one engine (vllm)")
    add("--seed", type=int, default=42, help="seed of the responses")
    add("--samples", type=int, default=3, help="responses kept in full")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the weights")
    add("--system", default="keep", choices=("keep", "fold"), help="fold: join system turns into the first user turn")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def check_options(options: Any) -> SamplingConfig:
    """Check every flag that needs no file; return the sampling specification (temperature aside)."""
    from spin.alignment.generation import BACKENDS
    from spin.alignment.scoring import SCORERS, find_scorer

    lookup(BACKENDS, options.backend, "generation backend")
    if options.metric.isidentifier():
        lookup(SCORERS, options.metric, "metric")
    find_scorer(options.metric)
    for name, lowest in (("limit", 0), ("batch_size", 1), ("samples", 0), ("tensor_parallel_size", 1)):
        if getattr(options, name) < lowest:
            raise InputError(f"{name} is {getattr(options, name)}: set it to {lowest} or more")
    sampling = [
        SamplingConfig(temperature=temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
        for temperature in options.temperatures
    ]
    if len(set(options.temperatures)) < len(options.temperatures):
        raise InputError("temperatures names one value twice: name each once")
    return sampling[0]


def load_held_out(options: Any, encoder: ChatEncoder, context: int) -> tuple[list[HeldOut], int]:
    """Return the held-out prompts to score and how many were left out because they do not fit."""
    from spin.alignment.data import load_prompts
    from spin.alignment.evaluation import encode_held_out
    from spin.alignment.fractions import fraction_rows

    prompts = load_prompts(options.input_dir, options.split)
    if options.limit and options.limit < len(prompts):
        prompts = prompts.select(fraction_rows(len(prompts), 0, options.limit))
    return encode_held_out(prompts.to_list(), encoder, context, options.max_new_tokens)


def score(options: Any, sampling: SamplingConfig, held_out: list[HeldOut], encoder: ChatEncoder) -> dict[str, Any]:
    """Generate and score with one loaded model (an engine is closed before the model is loaded for the NLL)."""
    import torch

    from spin.alignment.configs import ModelConfig
    from spin.alignment.evaluation import evaluate_responses, truth_nll
    from spin.alignment.generation import BackendSettings, make_backend
    from spin.alignment.model_utils import load_model
    from spin.alignment.scoring import find_scorer

    longest = max(len(item.request.token_ids) for item in held_out) + options.max_new_tokens
    settings = BackendSettings(
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        batch_size=options.batch_size,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=longest,
        trust_remote_code=options.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
    )
    chunk = options.batch_size * 16 if options.backend == "transformers" else len(held_out)
    backend = make_backend(options.backend, settings)
    try:
        scores = evaluate_responses(
            backend,
            held_out,
            encoder,
            find_scorer(options.metric),
            sampling,
            options.temperatures,
            options.samples,
            chunk,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        model = getattr(backend, "model", None)
        if model is not None:
            return scores | truth_nll(model, held_out, encoder.pad_id, options.batch_size)
    finally:
        backend.close()
    config = ModelConfig(
        model_name_or_path=options.model,
        model_revision=options.revision,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return scores | truth_nll(model, held_out, encoder.pad_id, options.batch_size)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    sampling = check_options(options)
    interrupt_on_sigterm()
    from transformers import AutoConfig

    from spin.alignment.chat import ChatEncoder, context_length, load_tokenizer
    from spin.alignment.model_utils import check_model_path, model_folder
    from spin.alignment.provenance import hash_weights
    from spin.alignment.shards import write_json_atomic

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
