"""Packed against padded log-probs in bfloat16, both compared with padded rows in float32, for random models of three families."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.part import Findings, timed
from benchmarks.shapes import EOS_ID, PAD_ID, SHAPES, Pair, draw_lengths, make_pairs
from spin.alignment.logprobs.pair_forward import PairForward

if TYPE_CHECKING:
    from torch import Tensor

# Sizes of transformers' configurations; fewer layers than the models that they are named after.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "sliding_window": 512,
    },
}
TINY_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
}
# Large enough for attention to matter; transformers' 0.02 gives nearly uniform distributions.
INITIALIZER_RANGE = 0.05
PAIRS, TINY_PAIRS = 8, 3


def measure_packing(findings: Findings) -> None:
    """Record, for every family, the errors of both ways of batching, their difference, and their seconds."""
    for family in FAMILIES:
        findings.attempt(family, partial(measure_family, family, findings.device, findings.tiny))


def measure_family(family: str, device: str, tiny: bool) -> dict[str, Any]:
    """Return mean and largest differences in nats per token between packed, padded and float32 log-probs."""
    settings = FAMILIES[family] | (TINY_SIZES if tiny else {})
    pairs = draw_pairs("uc", TINY_PAIRS if tiny else PAIRS, settings["vocab_size"], tiny)
    model = random_model(family, settings, device, torch.bfloat16)
    wide = random_model(family, settings, device, torch.float32)
    wide.load_state_dict(model.state_dict())
    reference = torch.cat([_forward(wide, device).logps([pair])[half] for half in (0, 1) for pair in pairs])
    del wide
    forward = _forward(model, device)
    forward = forward.packed(token_budget=1 << 16)
    found: dict[str, Any] = {"kernel": forward.kernel, "tokens": len(reference)}
    with forward.evaluation():
        for name, score in (("packed", forward.logps), ("padded", forward.padded_logps)):
            score(pairs)  # compiles and allocates
            seconds, each = timed(device, partial(score, pairs))
            found[name] = {"seconds": seconds, "logps": torch.cat(each)}
    logps = {name: found[name].pop("logps") for name in ("packed", "padded")}
    for name in logps:
        found[name]["error"] = _difference(logps[name], reference)
    return found | {"difference": _difference(logps["packed"], logps["padded"])}


def random_model(family: str, settings: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Return a random model in evaluation mode, with the attention of padded rows that its family has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": None}
    config = AutoConfig.for_model(family, **settings, **ids, initializer_range=INITIALIZER_RANGE)
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def draw_pairs(shape: str, count: int, vocab_size: int, tiny: bool) -> list[Pair]:
    """Return random pairs with the lengths of a shape; at tiny sizes, a sixteenth of them."""
    rng = np.random.default_rng(0)
    lengths = draw_lengths(SHAPES[shape], count, rng)
    return make_pairs(lengths // 16 + 2 if tiny else lengths, vocab_size, rng)


def _forward(model: Any, device: str) -> PairForward:
    return PairForward.of(model, PAD_ID, torch.device(device), model.dtype, pairs_per_batch=1)


def _difference(one: Tensor, other: Tensor) -> dict[str, float]:
    distance = (one - other).abs()
    return {"mean": distance.mean().item(), "max": distance.max().item()}
