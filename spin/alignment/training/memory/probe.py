"""Model properties that memory depends on: weight counts, and the measured bytes that layers save for the backward pass."""

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
from spin.alignment.logprobs.pair_forward import PairForward

_SIZES = (64, 128, 192)


@dataclass(frozen=True)
class ModelStats:
    """Numbers and bytes of a model's weights before any sharding; ``embedding`` fields are 0 if it is not trained."""

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
        """Count the weights of a causal language model, wrapped or not."""
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
    """Return the number of elements of the unsharded weight; DeepSpeed ZeRO-3 stores it in an attribute."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def layers(model: Any) -> list[Any]:
    """Return the layers that gradient checkpointing recomputes as units."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass(frozen=True)
class Growth:
    """Bytes for one sequence as a function of its n tokens: ``fixed + linear * n + square * n**2``."""

    fixed: float
    linear: float
    square: float

    @classmethod
    def fit(cls, sizes: tuple[int, ...], found: list[int]) -> Growth:
        """Fit a parabola through three points, or a line where the parabola would have a negative coefficient."""
        # The quadratic part is attention that stores its scores; kernels that do not are linear in n.
        square, linear, fixed = np.polyfit(sizes, found, 2)
        if square < 0 or fixed < 0:
            square, (linear, fixed) = 0.0, np.polyfit(sizes, found, 1)
        return cls(max(0.0, float(fixed)), float(linear), float(square))

    def growing(self, tokens: int, pair_tokens: int) -> float:
        """Return the bytes beyond ``fixed`` for a row of ``tokens`` tokens made up of pairs of ``pair_tokens`` tokens."""
        return tokens * (self.linear + self.square * min(tokens, pair_tokens))


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a forward pass saves for the backward pass (``kept``), and would save without checkpointing (``plain``).

    The ``fixed`` parts are copies of weights in the precision of the matrix products.
    """

    kept: Growth
    plain: Growth
    layers: int
    checkpointed: bool

    def layer_bytes(self, tokens: int, pair_tokens: int) -> float:
        """Return the bytes that one layer saves; with checkpointing they exist only during its backward pass."""
        return self.plain.growing(tokens, pair_tokens) / self.layers


def measure_activations(model: Any, forward: Callable[[int], Any], sizes: tuple[int, ...] = _SIZES) -> ActivationCost:
    """Measure the bytes that a model in training mode saves for the backward pass.

    ``forward(n)`` runs one pair of ``n`` tokens and returns a tensor that depends on the weights. It is called for each of three
    sizes, and again without gradient checkpointing if that is on. Every process must call this function.
    """
    kept = Growth.fit(sizes, [saved_bytes(model, forward, size) for size in sizes])
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    plain = kept
    if checkpointed:
        with _without_checkpointing(checkpointed):
            plain = Growth.fit(sizes, [saved_bytes(model, forward, size) for size in sizes])
    return ActivationCost(kept, plain, max(1, len(layers(model))), bool(checkpointed))


def pass_one_pair(forward: PairForward, tokens: int) -> torch.Tensor:
    """Run a synthetic pair forward as in training, with equal shares of tokens for the prompt and each response.

    No objective is used: the fused head would compute gradients, which a measured pass does not have.
    """
    names = forward.batcher.collator.responses
    share = tokens // (1 + len(names))
    pair = {"prompt_ids": [0] * (tokens - len(names) * share)} | {f"{name}_ids": [0] * share for name in names}
    forward.model.train()
    return forward.model(packed=forward.collate([pair]).batch)


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
    """Return the bytes saved by the graph of a forward pass, excluding weights and buffers; each storage counts once.

    No tensor is kept alive by the measurement: temporarily gathered weights (ZeRO-3, FSDP) are freed as usual.
    """
    alive: dict[int, int] = {}
    total = 0

    def pack(tensor: torch.Tensor) -> None:
        nonlocal total
        # A DTensor (FSDP) keeps its shard in ``_local_tensor``. Views of one storage are counted once.
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        address = storage.data_ptr()
        if address and address not in alive and address not in _weight_addresses(model):
            alive[address] = storage.nbytes()
            total += storage.nbytes()
            weakref.finalize(storage, alive.pop, address, None)  # another tensor may reuse the address

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
        forward(size)
    return total


def _weight_addresses(model: Any) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr() for tensor in tensors}


def _never_unpacked(_: None) -> torch.Tensor:
    raise RuntimeError("a measured forward pass has no backward pass")
