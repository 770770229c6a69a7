"""Encoding a preference row as token ids of its prompt and both responses, with truncation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder


@dataclass(frozen=True)
class EncodedPair:
    """One preference pair as ids; both responses follow the same prompt. A truncated response has no EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pair(
    row: Mapping[str, Any], encoder: ChatEncoder, max_length: int, max_prompt_length: int
) -> EncodedPair | str:
    """Encode and truncate a preference row; if the pair has to be dropped, return the reason instead.

    Sampled ids (``chosen_token_ids``, ``rejected_token_ids``) are used as they are. If the prompt plus the longer response
    exceeds ``max_length`` tokens, the prompt keeps its BOS and its last tokens, ``max_prompt_length`` in total, and both
    responses are truncated to what remains.

    Raises:
        InputError: the two conversations have different prompts, or the template rejects them.
    """
    prompt = list(row["chosen"][:-1])
    if prompt != list(row["rejected"][:-1]):
        raise InputError(f"prompt {row.get('prompt_id', '?')}: chosen and rejected have different prompts: fix the row")
    if reason := encoder.refusal(prompt):
        return reason
    prompt_ids = encoder.prompt_ids(prompt)
    sides: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids = _side_ids(row, side, encoder, prompt_ids)
        if isinstance(ids, str):
            return ids
        sides[side] = ids
    whole = EncodedPair(prompt_ids, sides["chosen"], sides["rejected"])
    pair = truncate_pair(whole, max_length, max_prompt_length, encoder.tokenizer.bos_token_id)
    for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        if not ids:
            return f"empty {side} response after truncation to max_length {max_length}"
    return pair


def truncate_pair(pair: EncodedPair, max_length: int, max_prompt_length: int, bos_id: int | None) -> EncodedPair:
    """Truncate a pair in which either half exceeds ``max_length`` tokens: the prompt on the left, then both responses on the
    right."""
    if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length:
        return pair
    prompt_ids = truncate_prompt(pair.prompt_ids, max_prompt_length, bos_id)
    room = max(0, max_length - len(prompt_ids))
    return EncodedPair(prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room])


def truncate_prompt(ids: list[int], max_prompt_length: int, bos_id: int | None) -> list[int]:
    """Keep the last ``max_prompt_length`` tokens; if the prompt starts with a BOS, it replaces the first of them."""
    if len(ids) <= max_prompt_length:
        return ids
    if bos_id is not None and ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - max_prompt_length + 1 :]]
    return ids[len(ids) - max_prompt_length :]


def _side_ids(row: Mapping[str, Any], side: str, encoder: ChatEncoder, prompt_ids: list[int]) -> list[int] | str:
    """The response ids of one half, or the reason why there are none."""
    sampled = row.get(f"{side}_token_ids")
    if sampled is not None:
        return [int(token) for token in sampled] or f"empty {side} response"
    if not row[side][-1]["content"]:
        return [encoder.end_id]  # the model answered with the end of turn alone
    if reason := encoder.refusal(row[side][-1:]):
        return reason
    ids = encoder.response_ids(row[side], prompt_ids)
    # A response that reached the length limit did not end, so the model must not learn an end of turn there.
    return ids[:-1] or f"empty {side} response" if row.get(f"{side}_finish_reason") == "length" else ids
