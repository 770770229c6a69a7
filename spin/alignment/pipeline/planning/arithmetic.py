"""The arithmetic of a plan: weights of a decoder from its config.json, FLOPs of its passes, bytes of what is written.

Plain numbers, no torch. A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.core.errors import InputError

# Decoders of which the formulas below are exact (tests count them on the meta device). All have gated MLPs and RMS norms.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ID_BYTES, LOGP_BYTES = 4, 4  # an int32 token id, a float32 log-prob


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that FLOPs and bytes depend on.

    Attributes:
        layer_weights: weights of one layer; ``final_weights`` are those of the norm after the last one.
        key_width: numbers per token and layer in the key cache (key-value heads times head size); the value cache has as many.
        query_width: attention heads times head size.
    """

    hidden: int
    layers: int
    intermediate: int
    vocab: int
    query_width: int
    key_width: int
    layer_weights: int
    final_weights: int
    tied: bool

    @property
    def table_weights(self) -> int:
        """Weights of the embedding; the head has as many, or shares them."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All weights: embedding, head unless tied, layers, final norm."""
        return (1 if self.tied else 2) * self.table_weights + self.layers * self.layer_weights + self.final_weights

    @property
    def cache_numbers(self) -> int:
        """Numbers per token in the cache of keys and values, over all layers."""
        return 2 * self.layers * self.key_width


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape of a model of one of the ``FAMILIES`` from the content of its config.json.

    Raises:
        InputError: another family, or a size is missing; ``where`` names the file.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{where} has model_type {family}: the formulas are for {', '.join(FAMILIES)}")
    hidden, layers, heads = (_size(config, name, where) for name in _REQUIRED[:3])
    intermediate, vocab = (_size(config, name, where) for name in _REQUIRED[3:])
    cached_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads))
    query, key = heads * head, cached_heads * head
    attention = hidden * (query + 2 * key) + query * hidden
    if family == "qwen2" or config.get("attention_bias"):
        attention += query + 2 * key + (0 if family == "qwen2" else hidden)
    mlp = 3 * hidden * intermediate
    if config.get("mlp_bias"):
        mlp += 2 * intermediate + hidden
    norms = 2 * hidden + (2 * head if family == "qwen3" else 0)
    return ModelShape(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        vocab=vocab,
        query_width=query,
        key_width=key,
        layer_weights=attention + mlp + norms,
        final_weights=hidden,
        tied=bool(config.get("tie_word_embeddings")),
    )


_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def _size(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where} lacks a positive number '{name}': restore the file that the model was saved with")
    return value


def forward_flops(shape: ModelShape, tokens: float, predicted: float, attended: float) -> float:
    """Return the FLOPs of a forward pass.

    Args:
        tokens: tokens that go through the layers.
        predicted: those whose logits are computed.
        attended: earlier tokens that a token attends to, on average.
    """
    layers = 2 * tokens * shape.layers * shape.layer_weights
    # Scores (queries times keys) and their product with the values, each 2 FLOPs per number.
    attention = 4 * tokens * attended * shape.query_width * shape.layers
    return layers + attention + 2 * predicted * shape.table_weights


def training_flops(shape: ModelShape, tokens: float, predicted: float, attended: float, checkpointing: bool) -> float:
    """Return the FLOPs of forward and backward passes: those of three forward passes, and with gradient checkpointing of a fourth
    through the layers.
    """
    step = 3 * forward_flops(shape, tokens, predicted, attended)
    return step + (forward_flops(shape, tokens, 0, attended) if checkpointing else 0)


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt, of its ground truth and of a generated response, and bytes of text per token."""

    prompt: float
    ground_truth: float
    response: float
    text_bytes: float = 4.0

    def truncated(self, max_length: int, max_prompt_length: int) -> Lengths:
        """Return the lengths after truncation as in training, of a pair of mean lengths: the prompt first, then the response."""
        longest = max(self.ground_truth, self.response)
        prompt = self.prompt if self.prompt + longest <= max_length else min(self.prompt, max_prompt_length)
        left = max(1.0, max_length - prompt)
        return Lengths(prompt, min(self.ground_truth, left), min(self.response, left), self.text_bytes)


def prompt_store_bytes(prompts: float, lengths: Lengths) -> float:
    """Return the bytes of the prompts as generation maps them into memory: the text of prompt and ground truth."""
    return prompts * (lengths.prompt + lengths.ground_truth) * lengths.text_bytes


def row_bytes(rows: float, lengths: Lengths) -> float:
    """Return the bytes of generated rows, or of as many pairs, before compression: two conversations and the sampled ids."""
    text = (2 * lengths.prompt + lengths.ground_truth + lengths.response) * lengths.text_bytes
    return rows * (text + lengths.response * ID_BYTES)


def reference_bytes(pairs: float, responses: float) -> float:
    """Return the bytes of the reference store: a log-prob for each of the ``responses`` tokens of a pair."""
    return pairs * responses * LOGP_BYTES


def generation_flops(shape: ModelShape, prompts: float, samples: int, lengths: Lengths) -> tuple[float, float]:
    """Return the FLOPs of prefilling and of decoding ``samples`` responses to each prompt, whose cache is computed once."""
    prefill = prompts * forward_flops(shape, lengths.prompt, 1, lengths.prompt / 2)
    attended = lengths.prompt + lengths.response / 2
    decode = prompts * samples * forward_flops(shape, lengths.response, lengths.response, attended)
    return prefill, decode


@dataclass(frozen=True)
class Decoding:
    """One engine of ``tensor_parallel`` devices: the sequences it decodes at the same time, and the bytes a step reads."""

    sequences: int
    bytes_per_step: float


# vLLM decodes at most this many sequences together by default (max_num_seqs).
LARGEST_BATCH = 256


def decoding(
    shape: ModelShape, itemsize: int, lengths: Lengths, memory: float, most: int = LARGEST_BATCH
) -> Decoding | None:
    """Return how an engine with ``memory`` bytes decodes; None if weights and the cache of one sequence do not fit.

    A step produces one token per sequence, and reads all weights once and the cache of every sequence.
    """
    weights, per_token = shape.weights * itemsize, shape.cache_numbers * itemsize
    whole = per_token * (lengths.prompt + lengths.response)
    sequences = min(most, int((memory - weights) / whole))
    if sequences < 1:
        return None
    return Decoding(sequences, weights + sequences * per_token * (lengths.prompt + lengths.response / 2))


def decoding_seconds(tokens: float, engines: int, engine: Decoding, bytes_per_second: float) -> float:
    """Return the seconds that ``engines`` take to read what decoding ``tokens`` requires (memory bandwidth is the limit)."""
    return tokens / (engines * engine.sequences) * engine.bytes_per_step / bytes_per_second
