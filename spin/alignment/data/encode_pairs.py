"""Encoding a preference row as token ids of its prompt and its responses, with truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.data.chat_encoder import ChatEncoder, RowRefused, template_arguments
from spin.alignment.data.encode_together import Steps


@dataclass(frozen=True)
class EncodedPair:
    """The responses of one preference row as ids, by name; all follow the same prompt. A truncated response has no EOS.

    ``truncated`` is the number of tokens that were removed from the prompt and from all responses.
    """

    prompt_ids: list[int]
    responses: Mapping[str, list[int]]
    truncated: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def chosen_ids(self) -> list[int]:
        return self.responses["chosen"]

    @property
    def rejected_ids(self) -> list[int]:
        return self.responses["rejected"]

    def columns(self) -> dict[str, list[int]]:
        """Return ``prompt_ids`` and ``{response}_ids``: the columns of the encoded row."""
        return {"prompt_ids": self.prompt_ids} | {f"{name}_ids": ids for name, ids in self.responses.items()}


class DroppedPair(str):
    """The reason why a row is dropped. ``tokens`` is the number of its tokens; 0 if it could not be encoded."""

    tokens: int = 0

    @classmethod
    def of(cls, reason: str, tokens: int) -> DroppedPair:
        """Return a reason with the number of tokens that are dropped."""
        dropped = cls(reason)
        dropped.tokens = tokens
        return dropped


def encode_pair(
    row: Mapping[str, Any],
    encoder: ChatEncoder,
    max_length: int,
    max_prompt_length: int,
    responses: Sequence[str] = SIDES,
) -> EncodedPair | str:
    """Encode and truncate a preference row; if it has to be dropped, return the reason instead (see :class:`DroppedPair`).

    Sampled ids (``chosen_token_ids``, ``rejected_token_ids``) are used as they are. If the prompt plus the longest response
    exceeds ``max_length`` tokens, the prompt keeps its BOS and its last tokens, ``max_prompt_length`` in total, and all
    responses are truncated to what remains. ``responses`` are the columns to encode.

    Raises:
        InputError: the conversations have different prompts, or the template rejects them.
    """
    return encoder.run(pair_steps(row, encoder, max_length, max_prompt_length, responses))


def pair_steps(
    row: Mapping[str, Any],
    encoder: ChatEncoder,
    max_length: int,
    max_prompt_length: int,
    responses: Sequence[str] = SIDES,
) -> Steps[EncodedPair | str]:
    """The steps of :func:`encode_pair`, for :func:`run_together`."""
    prompt = list(row[responses[0]][:-1])
    for name in responses[1:]:
        if prompt != list(row[name][:-1]):
            raise InputError(
                f"prompt {row.get('prompt_id', '?')}: {responses[0]} and {name} have different prompts: correct the row"
            )
    try:
        arguments = template_arguments(row)
        text = encoder.text.prompt(prompt, arguments.get("tools"), arguments.get("chat_template_kwargs"))
        prompt_ids = yield from encoder.prompt_steps(text)
    except RowRefused as refused:
        return str(refused)
    found: dict[str, list[int]] = {}
    for name in responses:
        ids = yield from _response_steps(row, name, encoder, prompt_ids, text)
        if isinstance(ids, str):
            return DroppedPair.of(ids, len(prompt_ids) + sum(map(len, found.values())))
        found[name] = ids
    whole = EncodedPair(prompt_ids, found)
    pair = truncate_pair(whole, max_length, max_prompt_length, encoder.tokenizer.bos_token_id)
    for name, ids in pair.responses.items():
        if not ids:
            tokens = len(prompt_ids) + sum(map(len, found.values()))
            return DroppedPair.of(f"empty {name} response after truncation to max_length {max_length}", tokens)
    return pair


def truncate_pair(pair: EncodedPair, max_length: int, max_prompt_length: int, bos_id: int | None) -> EncodedPair:
    """Truncate a row whose prompt and longest response exceed ``max_length`` tokens: the prompt on the left, then all responses
    on the right.
    """
    if len(pair.prompt_ids) + max(map(len, pair.responses.values())) <= max_length:
        return pair
    prompt_ids = truncate_prompt(pair.prompt_ids, max_prompt_length, bos_id)
    free = max(0, max_length - len(prompt_ids))
    responses = {name: ids[:free] for name, ids in pair.responses.items()}
    removed = sum(len(ids) - len(responses[name]) for name, ids in pair.responses.items())
    return EncodedPair(prompt_ids, responses, (len(pair.prompt_ids) - len(prompt_ids), removed))


def truncate_prompt(ids: list[int], max_prompt_length: int, bos_id: int | None) -> list[int]:
    """Keep the last ``max_prompt_length`` tokens; if the prompt starts with a BOS, it replaces the first of them."""
    if len(ids) <= max_prompt_length:
        return ids
    if bos_id is not None and ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - max_prompt_length + 1 :]]
    return ids[len(ids) - max_prompt_length :]


def _response_steps(
    row: Mapping[str, Any], side: str, encoder: ChatEncoder, prompt_ids: list[int], prompt_text: str
) -> Steps[list[int] | str]:
    """The ids of one response, or the reason why there are none."""
    sampled = row.get(f"{side}_token_ids")
    if sampled is not None:
        return [int(token) for token in sampled] or f"empty {side} response"
    turn = row[side][-1]
    if not any(turn.get(key) for key in ("content", "reasoning_content", "tool_calls")):
        return [encoder.end_id]  # the model answered with the end of turn alone
    try:
        ids = yield from encoder.response_steps(
            row[side], prompt_ids, **template_arguments(row), prompt_text=prompt_text
        )
    except RowRefused as refused:
        return str(refused)
    # A response that reached the length limit did not end, so the model must not learn an end of turn there.
    return ids[:-1] or f"empty {side} response" if row.get(f"{side}_finish_reason") == "length" else ids
