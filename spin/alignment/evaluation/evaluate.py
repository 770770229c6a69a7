"""One model scored on held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.program import Parser
from spin.alignment.generation.base import SamplingConfig

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.evaluation.held_out import HeldOut


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
    from spin.alignment.generation import BACKENDS, check_backend_settings, find_backend
    from spin.alignment.rewards import SCORERS, find_scorer

    if find_backend(options.backend).needs_server:
        others = " or ".join(name for name in BACKENDS if not find_backend(name).needs_server)
        raise InputError(
            f"backend {options.backend} asks a running server, and an evaluation loads its model itself: choose {others}"
        )
    check_backend_settings(options.backend, vars(options))
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
    from spin.alignment.data.fractions import fraction_rows
    from spin.alignment.data.rows import load_prompts
    from spin.alignment.evaluation.held_out import encode_held_out

    prompts = load_prompts(options.input_dir, options.split)
    if options.limit and options.limit < len(prompts):
        prompts = prompts.select(fraction_rows(len(prompts), 0, options.limit))
    return encode_held_out(prompts.to_list(), encoder, context, options.max_new_tokens)


def score(options: Any, sampling: SamplingConfig, held_out: list[HeldOut], encoder: ChatEncoder) -> dict[str, Any]:
    """Generate and score with one loaded model (an engine is closed before the model is loaded for the NLL)."""
    import torch

    from spin.alignment.evaluation.held_out import evaluate_responses, truth_nll
    from spin.alignment.generation import find_backend, make_backend
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model
    from spin.alignment.rewards import find_scorer

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
    chunk = options.batch_size * 16 if find_backend(options.backend).holds_batch else len(held_out)
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
            say_error,
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
