"""PairForward: the forward pass of preference pairs, shared by trainers and programs that only score."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PACKED_ATTENTION, check_architecture, choose_kernel
from spin.alignment.logprobs.batch import Feature
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import (
    batch_logps,
    causal_model,
    install_packed_forward,
    reference_pass,
    use_attention,
)
from spin.alignment.logprobs.micro_batches import MicroBatch, MicroBatcher

_MIXED_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def weight_dtype(model: Any) -> torch.dtype:
    """Return the precision of a model's weights."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def compute_dtype(model: Any, mixed_precision: str | None = None) -> torch.dtype:
    """Return the precision of a model's matrix products: that of mixed precision (accelerate's name), else of the weights."""
    return _MIXED_PRECISION.get(mixed_precision or "no", weight_dtype(model))


@dataclass(frozen=True)
class PairForward:
    """A model with everything needed to run pairs through it.

    Attributes:
        model: the model, possibly wrapped (DDP, DeepSpeed, FSDP).
        batcher: divides pairs into micro-batches and collates them, packed or padded.
        padded: collates padded rows, which any model accepts; the collator of ``batcher`` unless that packs.
        device: device of the tensors.
        dtype: precision of the matrix products.
        own_attention: the model's attention implementation for padded rows.
        autocast: context for computing log-probs; a training step uses the Trainer's.
        fused_head: whether the head's gradient is computed while a group's logits exist (packed rows only).
    """

    model: Any
    batcher: MicroBatcher
    padded: PairCollator
    device: torch.device
    dtype: torch.dtype
    own_attention: str
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    fused_head: bool = False

    @classmethod
    def of(
        cls,
        model: Any,
        pad_id: int,
        device: torch.device,
        dtype: torch.dtype,
        pairs_per_batch: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        responses: tuple[str, ...] = SIDES,
    ) -> PairForward:
        """Return the forward pass with padded rows, ``pairs_per_batch`` pairs at a time. The model is not changed.

        ``responses`` are the responses of a row, in the order of the loss's streams.
        """
        padded = PairCollator(pad_id, responses)
        own_attention = str(causal_model(model).config._attn_implementation)
        return cls(model, MicroBatcher(padded, 0, pairs_per_batch), padded, device, dtype, own_attention, autocast)

    def packed(
        self, token_budget: int, attention: str = "auto", share_prompts: bool = True, fused_head: bool = False
    ) -> PairForward:
        """Return the forward pass with packed rows of up to ``token_budget`` tokens, and patch the model to accept them.

        ``attention`` is the requested kernel; ``fused_head`` requests a head that is fused with the loss.

        Raises:
            InputError: this architecture does not support packed rows, or the requested kernel does not work here.
        """
        causal = causal_model(self.model)
        check_architecture(causal)
        kernel = choose_kernel(causal, self.device, self.dtype, attention)
        fused_head = install_packed_forward(self.model, fused_head)
        vocab_size = causal.config.get_text_config().vocab_size
        collator = PackedCollator(kernel, vocab_size, share_prompts, self.padded.responses)
        batcher = MicroBatcher(collator, token_budget, self.batcher.pairs)
        return replace(self, batcher=batcher, fused_head=fused_head)

    def with_budget(self, token_budget: int) -> PairForward:
        """Return a copy with another maximum number of tokens per packed row."""
        return replace(self, batcher=replace(self.batcher, token_budget=token_budget))

    @property
    def kernel(self) -> str | None:
        """The attention kernel of packed rows; None if rows are padded."""
        collator = self.batcher.collator
        return collator.kernel if isinstance(collator, PackedCollator) else None

    def tokens(self, feature: Feature) -> int:
        """Return the number of tokens that a pair takes up in a row."""
        return self.batcher.collator.tokens(feature)

    def collate(self, features: Sequence[Feature]) -> MicroBatch:
        """Collate pairs into one micro-batch on the device."""
        return self.batcher.collate(features, range(len(features)), self.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Switch the model to evaluation mode without gradients, and restore its mode on exit.

        Mixed precision converts each weight once for all batches in between: do not change the weights between two of them.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            # autocast empties its cache of 16-bit weights when the outermost context ends, and this one is the outermost.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.model.train(was_training)

    def logps(self, features: Sequence[Feature]) -> list[torch.Tensor]:
        """Return the token log-probs (nats, float32, on the CPU) of pairs, computed as one micro-batch.

        One tensor ``(R,)`` per response of R tokens: the chosen responses first, then the rejected ones.
        """
        return self.batch_logps(self.collate(features))

    def batch_logps(self, micro_batch: MicroBatch) -> list[torch.Tensor]:
        """Return the same log-probs for pairs that are collated already."""
        return self._logps(micro_batch.batch)

    def _logps(self, batch: Any) -> list[torch.Tensor]:
        with torch.no_grad(), self.autocast():
            return batch_logps(self.model, batch)

    def reference_pass(self, micro_batch: MicroBatch) -> Any:
        """Return what the KL term needs of the model as the reference (see :func:`forward.reference_pass`)."""
        with self.autocast():
            return reference_pass(self.model, micro_batch.batch, self.dtype)

    def padded_logps(self, features: Sequence[Feature]) -> list[torch.Tensor]:
        """Return the same log-probs from padded rows and the model's own attention, for a model patched for packed rows."""
        batch = {name: value.to(self.device) for name, value in self.padded(features).items()}
        use_attention(self.model, self.own_attention)
        try:
            return self._logps(batch)
        finally:
            use_attention(self.model, PACKED_ATTENTION)
