"""Gains that come with the pairs (TIS-DPO's files), moved to the tokens that are trained on.

They belong to the tokens of the bare response text; a chat template may strip that text, change its first and last tokens, and
adds an end of turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.token_weights.align_tokens import aligned_gains, character_logps, token_spans
from spin.alignment.token_weights.model_scores import student_text


def gains_of_pair(
    row: Mapping[str, Any], encoded: Mapping[str, Any], encoder: ChatEncoder, where: str
) -> tuple[list[float], list[float]]:
    """Return the gains (nats) of the tokens of both responses of a preference row.

    Args:
        row: with ``chosen_gains`` and ``rejected_gains``.
        encoded: ``chosen_ids`` and ``rejected_ids``, untruncated.

    Raises:
        InputError: the row has no gains, or they do not line up with the tokens.
    """
    chosen, rejected = (_gains_of(row, side, encoded[f"{side}_ids"], encoder, where) for side in SIDES)
    return chosen, rejected


def _gains_of(row: Mapping[str, Any], side: str, ids: Sequence[int], encoder: ChatEncoder, where: str) -> list[float]:
    gains = row.get(f"{side}_gains")
    if gains is None:
        raise InputError(
            f"{where} has no gains of tokens (TIS-DPO's 'chosen_weight' and 'rejected_weight'): add them, or choose another "
            "weighting"
        )
    text = row[side][-1]["content"]
    bare = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(bare) != len(gains):
        raise InputError(
            f"{where}: '{side}_weight' has {len(gains)} numbers, but the {side} response has {len(bare)} tokens with the "
            f"tokenizer of {encoder.name}: pass the tokenizer of the models that computed them, or compute them again"
        )
    ended = ids[-1] in encoder.stop_ids
    rendered, places = student_text(encoder, ids[:-1] if ended else ids)
    whole, spans = token_spans(encoder.raw_text, bare)
    if rendered.strip() != whole.strip():
        raise InputError(
            f"{where}: the chat template of {encoder.name} changes the text of the {side} response, so '{side}_weight' does not "
            "line up with its tokens: correct the text, or compute weights with another weighting"
        )
    shares = character_logps(gains, spans, len(whole))
    # Spaces at the start that only one of both texts has.
    shift = (len(rendered) - len(rendered.lstrip())) - (len(whole) - len(whole.lstrip()))
    aligned = [*[None] * shift, *shares[max(-shift, 0) :]]
    found = aligned_gains(aligned, [0.0] * len(places), places)
    # The end of turn was not scored. A gain of 0 says that both models find it equally likely.
    return found + [0.0] * ended
