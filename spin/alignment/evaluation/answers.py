"""The responses of a model to the held-out prompts, and the log-likelihoods of the ground truths; in one process or several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    import torch

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.evaluation.held_out import HeldOut
    from spin.alignment.generation.base import GenerationBackend, Response

SCORED_TOGETHER = 16  # ground truths in one forward pass, whose logits are all in memory
_DAY = 24 * 3600  # seconds that a process waits for the slowest one


@dataclass(frozen=True)
class Answers:
    """What a model says to some prompts, in their order.

    Attributes:
        responses: for each temperature, the responses to each prompt.
        nats: of each ground truth, EOS included; None without one, or if it is not finite.
    """

    responses: list[list[list[Response]]]
    nats: list[float | None]


@dataclass(frozen=True)
class Place:
    """Which of the processes of ``accelerate launch`` this is."""

    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this process scores and writes."""
        return self.rank == 0


def own_place() -> Place:
    """Return the place of this process."""
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def answer_all(
    config: EvaluateConfig, held_out: Sequence[HeldOut], encoder: ChatEncoder, masked_ids: tuple[int, ...]
) -> Answers:
    """Return the answers to all prompts, which are divided among the processes; every process must call it.

    The seed of a response depends on its prompt only, so the number of processes does not change it.
    """
    place = own_place()
    if place.count == 1:
        return answer(config, held_out, encoder, masked_ids)
    own = held_out[place.rank :: place.count]
    part = answer(config, own, encoder, masked_ids) if own else Answers([[] for _ in config.temperatures], [])
    return join(gather(part), len(held_out))


def gather(part: Answers) -> list[Answers]:
    """Return the answers of every process, by rank."""
    from datetime import timedelta

    import torch.distributed as processes

    # Through gloo, which uses no GPU: an engine may have taken them all, or hidden all but its own.
    processes.init_process_group("gloo", timeout=timedelta(seconds=_DAY))
    try:
        found: list[Any] = [None] * processes.get_world_size()
        processes.all_gather_object(found, part)
    finally:
        processes.destroy_process_group()
    return found


def join(parts: Sequence[Answers], count: int) -> Answers:
    """Return the answers to ``count`` prompts, of which process r of n has answered r, r + n, r + 2n and so on."""
    order = [(parts[index % len(parts)], index // len(parts)) for index in range(count)]
    temperatures = range(len(parts[0].responses))
    return Answers(
        [[part.responses[temperature][place] for part, place in order] for temperature in temperatures],
        [part.nats[place] for part, place in order],
    )


def answer(
    config: EvaluateConfig, held_out: Sequence[HeldOut], encoder: ChatEncoder, masked_ids: tuple[int, ...]
) -> Answers:
    """Generate, and compute the log-likelihoods with the same loaded model if it can be used for both."""
    from spin.alignment.generation import find_backend
    from spin.alignment.models.folder import model_folder
    from spin.alignment.models.precision import machine_dtype

    backend = open_backend(config, held_out, encoder, masked_ids)
    try:
        responses = respond_at_all(config, backend, held_out)
        model = getattr(backend, "model", None)
        # The log-likelihoods are those of the stored weights, even where responses are generated with rounded ones.
        if model is not None and machine_dtype(model_folder(config.model, config.revision), config.dtype) is None:
            return Answers(responses, _nats(config, model, held_out, encoder))
    finally:
        backend.close()
    if find_backend(config.backend).needs_server or all(item.ground_truth is None for item in held_out):
        return Answers(responses, [None] * len(held_out))
    return Answers(responses, _nats(config, load_for_nats(config), held_out, encoder))


def respond_at_all(
    config: EvaluateConfig, backend: GenerationBackend, held_out: Sequence[HeldOut]
) -> list[list[list[Response]]]:
    """Return the responses at each temperature: of each prompt, ``num_samples`` of them."""
    from spin.alignment.evaluation.held_out import respond

    return [respond(backend, held_out, config.sampling(temperature), say_error) for temperature in config.temperatures]


def load_for_nats(config: EvaluateConfig) -> Any:
    """Load the model on this process's device."""
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model
    from spin.alignment.models.precision import generation_dtype

    loaded = ModelConfig(
        model_name_or_path=config.model,
        model_revision=config.revision,
        dtype=generation_dtype(config.model, config.dtype),
        trust_remote_code=config.trust_remote_code,
    )
    return load_model(loaded).to(own_device()).eval()


def own_device() -> torch.device:
    """Return the device of this process: its own GPU, if there are any."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus) if gpus else torch.device("cpu")


def open_backend(
    config: EvaluateConfig, held_out: Sequence[HeldOut], encoder: ChatEncoder, masked_ids: tuple[int, ...]
) -> GenerationBackend:
    """Load the model for generation, with a context that fits the longest prompt and a response."""
    from spin.alignment.core.settings import part_of
    from spin.alignment.generation import make_backend
    from spin.alignment.generation.base import BackendSettings

    settings = replace(
        part_of(config, BackendSettings, model=config.model),
        revision=config.revision,
        dtype=config.dtype,
        batch_size=config.batch_size,
        max_model_len=max(len(item.request.token_ids) for item in held_out) + config.max_new_tokens,
        trust_remote_code=config.trust_remote_code,
        stop_ids=encoder.stop_ids,
        masked_ids=masked_ids,
        pad_id=encoder.pad_id,
    )
    return make_backend(config.backend, settings)


def _nats(config: EvaluateConfig, model: Any, held_out: Sequence[HeldOut], encoder: ChatEncoder) -> list[float | None]:
    from spin.alignment.evaluation.held_out import ground_truth_nats

    return ground_truth_nats(model, held_out, encoder.pad_id, config.batch_size or SCORED_TOGETHER)
