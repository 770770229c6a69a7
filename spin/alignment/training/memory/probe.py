"""What memory depends on in a model: its weights, counted, and what its layers keep for the backward pass, measured."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spin.alignment.logprobs.forward import causal_model
from spin.alignment.logprobs.head import LogitTransform

_SIZES = (64, 128, 192)


@dataclass(frozen=True)
class ModelStats:
    """Weights of a whole model, however they are spread over processes: numbers of weights, and bytes."""

    weight_bytes: int
    trained: int
    trained_bytes: int
    largest: int
    layer_weights: int
    embedding_weights: int
    embedding_bytes: int
    vocab_size: int
    hidden_size: int
    head_itemsize: int
    head_trained: bool
    tied: bool
    transforms_logits: bool

    @classmethod
    def of(cls, model: Any) -> ModelStats:
        """Count the weights of a causal language model (wrapped or not). ``embedding`` is counted where it is trained."""
        causal = causal_model(model)
        config = causal.config.get_text_config()
        embedding, head = causal.get_input_embeddings().weight, causal.get_output_embeddings().weight
        weights = list(model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        sizes = [_number(weight) for weight in trained]
        trains_embedding = embedding.requires_grad
        return cls(
            weight_bytes=sum(_number(weight) * weight.itemsize for weight in weights),
            trained=sum(sizes),
            trained_bytes=sum(_number(weight) * weight.itemsize for weight in trained),
            largest=max(sizes, default=0),
            layer_weights=max((sum(map(_number, layer.parameters())) for layer in layers(model)), default=0),
            embedding_weights=_number(embedding) if trains_embedding else 0,
            embedding_bytes=_number(embedding) * embedding.itemsize if trains_embedding else 0,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            head_itemsize=head.itemsize,
            head_trained=head.requires_grad,
            tied=head is embedding and trains_embedding,
            transforms_logits=not LogitTransform.of(config).is_identity,
        )


def _number(weight: Any) -> int:
    """Return the number of elements of the whole weight; DeepSpeed ZeRO-3 keeps it in an attribute."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def layers(model: Any) -> list[Any]:
    """Return the layers that gradient checkpointing treats as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass(frozen=True)
class Growth:
    """Bytes as a function of the number of tokens: of one sequence of n tokens ``fixed + linear * n + square * n**2``."""

    fixed: float
    linear: float
    square: float

    @classmethod
    def fit(cls, sizes: tuple[int, ...], found: list[int]) -> Growth:
        """Return the parabola through three points; what is not negative stays so."""
        square, linear, fixed = np.polyfit(sizes, found, 2)
        if square < 0 or fixed < 0:
            square, (linear, fixed) = 0.0, np.polyfit(sizes, found, 1)
        return cls(max(0.0, float(fixed)), float(linear), float(square))

    def growing(self, tokens: int, pair_tokens: int) -> float:
        """Return the bytes beyond ``fixed`` of a row of ``tokens`` tokens that holds pairs of ``pair_tokens`` tokens."""
        return tokens * (self.linear + self.square * min(tokens, pair_tokens))


@dataclass(frozen=True)
class ActivationCost:
    """What a forward pass keeps for the backward pass (``kept``), and what it would keep without checkpointing (``plain``).

    Their ``fixed`` parts are copies of weights in the precision of the matrix products.
    """

    kept: Growth
    plain: Growth
    layers: int
    checkpointed: bool

    def layer_bytes(self, tokens: int, pair_tokens: int) -> float:
        """Return what one layer keeps; with checkpointing that exists while its backward pass runs."""
        return self.plain.growing(tokens, pair_tokens) / self.layers


def measure_activations(model: Any, forward: Callable[[int], Any], sizes: tuple[int, ...] = _SIZES) -> ActivationCost:
    """Measure what a model in training mode keeps for the backward pass.

    ``forward(n)`` passes one pair of ``n`` tokens and returns something that depends on the weights. It is called for each of
    three sizes, and again with gradient checkpointing off where it is on; every process must call this.
    """
    kept = Growth.fit(sizes, [saved_bytes(model, forward, size) for size in sizes])
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    plain = kept
    if checkpointed:
        with _without_checkpointing(checkpointed):
            plain = Growth.fit(sizes, [saved_bytes(model, forward, size) for size in sizes])
    return ActivationCost(kept, plain, max(1, len(layers(model))), bool(checkpointed))


@contextlib.contextmanager
def _without_checkpointing(modules: list[Any]) -> Iterator[None]:
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def saved_bytes(model: Any, forward: Callable[[int], Any], size: int) -> int:
    """Return the bytes that the graph of a forward pass saves, weights and buffers left out; each storage counts once.

    Nothing is kept meanwhile: weights that are gathered for a moment (ZeRO-3, FSDP) are let go as usual.
    """
    alive: dict[int, int] = {}
    total = 0

    def pack(tensor: torch.Tensor) -> None:
        nonlocal total
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        address = storage.data_ptr()
        if address and address not in alive and address not in _weight_addresses(model):
            alive[address] = storage.nbytes()
            total += storage.nbytes()
            weakref.finalize(storage, alive.pop, address, None)  # another tensor may get the address

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
        forward(size)
    return total


def _weight_addresses(model: Any) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr() for tensor in tensors}


def _never_unpacked(_: None) -> torch.Tensor:
    raise RuntimeError("a measured forward pass has no backward pass")
