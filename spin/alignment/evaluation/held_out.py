"""Held-out prompts: encoding them, answering them, and the log-likelihood of their ground truth, if any, under a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import template_arguments
from spin.alignment.data.held_out_rows import Skipped
from spin.alignment.data.rows import scorer_columns
from spin.alignment.data.turns import answer_text, question
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.data.chat_encoder import ChatEncoder

Tell = Callable[[str], None]
PROGRESS_SECONDS = 10.0
# Logits in memory while ground truths are scored: 0.5 GiB in 16 bits.
LOGITS_AT_ONCE = 2**28


@dataclass(frozen=True)
class HeldOut:
    """One held-out prompt: its request, its turns, the ground truth as text and ids (EOS included; None and no ids if it has
    none), the template arguments of its row (JSON text), and the other columns for the scorer."""

    request: PromptRequest
    messages: list[dict[str, str]]
    ground_truth: str | None
    ground_truth_ids: tuple[int, ...]
    chat_template_kwargs: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text that a rule receives as the prompt: the last user turn."""
        return question(self.messages)


def encode_held_out(
    rows: Sequence[dict[str, Any]], encoder: ChatEncoder, context: int, max_new_tokens: int
) -> tuple[list[HeldOut], list[Skipped]]:
    """Encode held-out rows; return those that can be encoded and fit into ``context`` tokens with the ground truth and with a
    response, and those that are skipped.

    Raises:
        InputError: no row is left.
    """
    held_out: list[HeldOut] = []
    skipped: list[Skipped] = []
    for row in rows:
        answered = row["chosen"][-1]["role"] == "assistant"
        prompt = row["chosen"][:-1] if answered else row["chosen"]
        ground_truth_ids: list[int] = []
        try:
            ids = encoder.prompt_ids(prompt, **template_arguments(row))
            if answered:
                ground_truth_ids = encoder.response_ids(row["chosen"], ids, **template_arguments(row))
        except InputError as error:
            skipped.append({"prompt_id": row["prompt_id"], "reason": str(error)})
            continue
        # Both the ground truth (for the NLL) and a response of full length must fit.
        needed = len(ids) + max(max_new_tokens, len(ground_truth_ids))
        if needed > context:
            reason = f"prompt and response need {needed} tokens, but the model takes {context}: lower max_new_tokens"
            skipped.append({"prompt_id": row["prompt_id"], "reason": reason})
            continue
        request = PromptRequest(row["prompt_id"], tuple(ids))
        held_out.append(
            HeldOut(
                request,
                prompt,
                answer_text(row["chosen"][-1]) if answered else None,
                tuple(ground_truth_ids),
                row.get("chat_template_kwargs"),
                scorer_columns(row),
            )
        )
    return held_out, skipped


def respond(
    backend: GenerationBackend, held_out: Sequence[HeldOut], sampling: SamplingConfig, tell: Tell
) -> list[list[Response]]:
    """Return the responses to each prompt, reporting progress every ten seconds and at the end."""
    # Long prompts first: once nothing is left to refill the batch, only short ones are running.
    order = sorted(range(len(held_out)), key=lambda index: -len(held_out[index].request.token_ids))
    responses: dict[int, list[Response]] = {}
    told = time.monotonic()
    for place, answer in backend.stream((held_out[index].request for index in order), sampling):
        responses[order[place]] = answer
        if time.monotonic() - told >= PROGRESS_SECONDS or len(responses) == len(order):
            told = time.monotonic()
            tell(f"temperature {sampling.temperature:g}: {len(responses)} of {len(order)} prompts")
    return [responses[index] for index in range(len(order))]


def ground_truth_nats(model: Any, held_out: Sequence[HeldOut], pad_id: int, batch_size: int) -> list[float | None]:
    """Return the negative log-likelihood of each ground truth in nats, EOS included; None where there is none, or it is not
    finite.

    At most ``batch_size`` are in a forward pass, fewer if their logits would take too much memory.
    """
    import torch

    from spin.alignment.logprobs.forward import causal_model, response_logps

    device = next(model.parameters()).device
    vocab_size = int(causal_model(model).config.get_text_config().vocab_size)
    nats: list[float | None] = [None] * len(held_out)
    for places in scored_together(held_out, batch_size, max(1, LOGITS_AT_ONCE // vocab_size)):
        batch = stack_ground_truths([held_out[index] for index in places], pad_id)
        with torch.inference_mode():
            # (B, R), 0 on padding, so a row's sum is the log-likelihood of its ground truth.
            logps = response_logps(model, {name: value.to(device) for name, value in batch.items()})
        for index, value in zip(places, (-logps.double().sum(dim=-1)).tolist(), strict=True):
            nats[index] = value if math.isfinite(value) else None
    return nats


def scored_together(held_out: Sequence[HeldOut], batch_size: int, positions: int) -> Iterator[list[int]]:
    """Yield the places of the ground truths of one forward pass: at most ``batch_size`` of similar length, and at most
    ``positions`` response tokens, padding included, if there is more than one."""
    known = [index for index, item in enumerate(held_out) if item.ground_truth is not None]
    truths = [len(item.ground_truth_ids) for item in held_out]
    known.sort(key=lambda index: (-len(held_out[index].request.token_ids) - truths[index], index))
    places: list[int] = []
    for index in known:
        longest = max([truths[index], *(truths[place] for place in places)])
        if places and (len(places) == batch_size or longest * (len(places) + 1) > positions):
            yield places
            places = []
        places.append(index)
    if places:
        yield places


def stack_ground_truths(items: Sequence[HeldOut], pad_id: int) -> dict[str, Tensor]:
    """Return the tensors of ``B`` prompts, each followed by its ground truth, in the layout of ``collators.py``."""
    from spin.alignment.logprobs.collators import PairCollator

    features = [
        {
            "prompt_ids": item.request.token_ids,
            "chosen_ids": item.ground_truth_ids,
            "rejected_ids": item.ground_truth_ids[:1],
        }
        for item in items
    ]
    # The collator returns (2B, ...) tensors, chosen rows first; the rejected half is only there to satisfy it.
    return {name: value[: len(items)] for name, value in PairCollator(pad_id)(features).items()}
