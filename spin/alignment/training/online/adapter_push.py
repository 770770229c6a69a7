"""Whether an engine or a server gets only the policy's LoRA adapter, or whole weights with the adapter merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.generation.openai.policy_server import PolicyServer
from spin.alignment.models.adapters import adapter_obstacle
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.online.config import OnlineConfig


def adapter_rank(model: Any, source: ModelConfig, args: OnlineConfig, obstacle_to: Callable[[int], str | None]) -> int:
    """Return the rank of the adapter to send by itself; 0 if whole weights are sent. If an adapter is merged, say why.

    ``source`` is what the engine or the server has loaded, and ``obstacle_to`` returns why it cannot apply an adapter of a rank.
    """
    # Otherwise the caller has made the module, and may have changed the weights below the adapter.
    if not source.use_peft:
        return 0
    rank = int(model.peft_config[model.active_adapter].r)
    obstacle = adapter_obstacle(model) or obstacle_to(rank)
    if obstacle and args.process_index == 0:
        say(f"backend {args.backend} gets whole weights, into which the LoRA adapter is merged: {obstacle}")
    return 0 if obstacle else rank


def server_adapter_rank(model: Any, source: ModelConfig, args: OnlineConfig, server: PolicyServer) -> int:
    """Return the same for a server.

    Raises:
        InputError: it takes neither the adapter nor whole weights.
    """
    highest = server.adapter_rank()

    def obstacle_to(rank: int) -> str | None:
        if rank <= highest:
            return None
        found = f"applies adapters up to rank {highest}" if highest > 0 else "applies none"
        return (
            f"the server {found}; started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank {rank} or "
            "more, it gets the adapter alone"
        )

    rank = adapter_rank(model, source, args, obstacle_to)
    if highest and not rank:
        raise InputError(
            f"the server at {args.server_url} was started with --enable-lora, so its weights cannot be replaced: start it without"
        )
    return rank
