"""What online training samples with: the policy's own module, an engine beside it, or a server elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.generation import find_backend, make_backend
from spin.alignment.generation.base import BackendSettings, GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.generation.openai.backend import OpenAIBackend
from spin.alignment.generation.openai.policy_server import PolicyServer
from spin.alignment.logprobs.forward import causal_model, use_attention
from spin.alignment.models.config import Dtype, ModelConfig
from spin.alignment.models.precision import compute_name
from spin.alignment.models.sharded import has_stored_names, is_sharded, reshard, sharding_name
from spin.alignment.models.vocabulary import ids_without_token
from spin.alignment.training.online.adapter_push import adapter_rank, server_adapter_rank
from spin.alignment.training.online.engine_sampler import EngineSampler
from spin.alignment.training.online.lockstep import Lockstep
from spin.alignment.training.online.policy_sampler import PolicySampler
from spin.alignment.training.online.served_sampler import ServedSampler
from spin.alignment.training.online.sharers import Sharers

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.online.config import OnlineConfig


class InPlaceSampler(PolicySampler):
    """Decodes with the policy's own module, so there are no weights to copy; if it is sharded, in step with all processes."""

    def __init__(
        self,
        policy: Any,
        settings: BackendSettings,
        own_attention: str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """``policy`` may have adapters, and is sharded, if at all, before the first response. ``own_attention`` is its
        attention before packing, ``precision`` the autocast context of training."""
        self._policy, self._settings, self._own, self._precision = policy, settings, own_attention, precision
        self._backend: GenerationBackend | None = None
        self._lockstep: Lockstep | None = None

    def refresh(self) -> None:
        """Do nothing: the weights are the policy's own."""

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Decode in evaluation mode and in the precision of training, then restore the module's mode and attention.

        If the policy is sharded, every process must call it, with any number of requests.
        """
        was_training = self._policy.training
        before = use_attention(self._policy, self._own)  # packed attention handles packed rows only
        self._policy.eval()
        reshard(self._policy)  # so that a resumed run decodes with the same kernels
        try:
            with self._precision():
                responses = self._ready().generate(requests, sampling)
                if self._lockstep is not None:
                    self._lockstep.finish()
                return responses
        finally:
            reshard(self._policy)
            use_attention(self._policy, before)
            self._policy.train(was_training)

    def _ready(self) -> GenerationBackend:
        """Return the backend; a policy that was sharded since the last response gets another."""
        from spin.alignment.generation.transformers.backend import TransformersBackend

        sharded = is_sharded(self._policy)
        if self._backend is None or sharded != (self._lockstep is not None):
            causal = causal_model(self._policy)
            self._lockstep = Lockstep(self._policy, causal.device) if sharded else None
            self._backend = TransformersBackend(self._settings, causal, self._lockstep)
        return self._backend

    def close(self) -> None:
        """Drop the reference to the module; its owner frees it."""
        self._backend = None


def make_sampler(
    model: Any,
    source: ModelConfig,
    args: OnlineConfig,
    encoder: ChatEncoder,
    own_attention: str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> PolicySampler:
    """Return the sampler of this process for the policy ``model``, which was loaded from ``source``. Every process must call it.

    Raises:
        InputError: the engine is not installed, or does not support the model or its sharding.
    """
    # Under mixed precision the policy's weights have 32 bits, but it computes in 16: so does the engine. Never in a precision
    # that the policy does not compute in.
    compute = compute_name(args)
    causal = causal_model(model)
    policy = cast(Dtype, str(causal.dtype).removeprefix("torch."))
    dtype = source.dtype if source.dtype != "auto" else compute or policy
    settings = BackendSettings(
        model=source.model_name_or_path,
        revision=source.model_revision,
        dtype=dtype,
        batch_size=args.generation_batch_size,
        max_model_len=args.max_prompt_length + args.max_new_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
        beside_training=True,
        keeps_memory=args.async_steps > 0,
        trust_remote_code=source.trust_remote_code,
        stop_ids=encoder.stop_ids,
        masked_ids=ids_without_token(encoder.tokenizer, causal.config),
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )
    kind, sent_as = find_backend(args.backend).online, getattr(torch, compute or policy)
    if kind == "own_module":
        return InPlaceSampler(model, settings, own_attention, precision)
    _check_can_send(model, args, kind)
    if kind == "server":
        # Its own command decides on the precision and the GPUs of a server.
        asked = replace(settings, dtype="auto", base_url=args.server_url)
        server = PolicyServer(str(args.server_url), os.environ.get("OPENAI_API_KEY", "").strip())
        rank = server_adapter_rank(model, source, args, server)
        client = cast(OpenAIBackend, make_backend(args.backend, asked))
        return ServedSampler(client, server, model, sent_as, only_adapter=rank > 0)
    rank = adapter_rank(model, source, args, partial(find_backend(args.backend).adapter_obstacle, causal.config))
    sharers = Sharers.of(args.tensor_parallel_size)
    leads = sharers is None or sharers.leads
    engine = make_backend(args.backend, replace(settings, adapter_rank=rank)) if leads else None
    return EngineSampler(engine, model, sent_as, sharers, only_adapter=rank > 0)


def _check_can_send(model: Any, args: OnlineConfig, kind: str) -> None:
    """Refuse a policy whose weights can only be saved to a folder if that is not possible.

    Raises:
        InputError: naming the architecture.
    """
    if has_stored_names(model):
        return
    adapters = "LoRA" if hasattr(model, "get_base_model") else None
    if obstacle := sharding_name(args) or adapters or ("a server" if kind == "server" else None):
        raise InputError(
            f"{type(causal_model(model)).__name__} has other weights in memory than model folders, so they cannot be sent to "
            f"{args.backend} one at a time, as {obstacle} requires: use backend transformers"
        )


__all__ = ["InPlaceSampler", "make_sampler"]
