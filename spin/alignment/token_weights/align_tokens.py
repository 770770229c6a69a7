"""Transfers log-probs from one tokenizer's tokens to another's through the characters they cover. Pure functions on spans.

A *span* is ``(start, end)`` in characters of the response text. A teacher's token divides its log-prob equally among its
characters, and a student's token gets the sum over its own characters: where both tokenizers split the text at the same places
the full log-prob is transferred, and the sum over the response is always preserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Span = tuple[int, int]


def character_logps(logps: Sequence[float], spans: Sequence[Span], length: int) -> list[float | None]:
    """Return the log-prob (nats) of each of ``length`` characters: NaN from the first token without a log-prob onwards, ``None``
    for a character that no token covers (white space that a chat template strips).

    A token that covers no character (the space that some tokenizers prepend) is added to the character at its position.
    """
    shares: list[float | None] = [None] * length
    for logp, (start, end) in zip(logps, spans, strict=False):
        first = min(start, length - 1)
        places = range(first, max(end, first + 1)) if length else range(0)
        for place in places:
            shares[place] = (shares[place] or 0.0) + logp / len(places)
    for start, end in spans[len(logps) :]:
        shares[start:end] = [math.nan] * (end - start)
    return shares


def aligned_gains(shares: Sequence[float | None], logps: Sequence[float], spans: Sequence[Span]) -> list[float]:
    """Return the gains ``log pi_teacher - log pi_student`` (nats) of the leading student tokens, which both models scored.

    ``shares`` are the teacher's per character, ``logps`` and ``spans`` the student's per token. Tokens that form a character only
    together (the bytes of an emoji) share their gain equally; characters that the teacher did not see give a gain of 0.
    """
    gains: list[float] = []
    for first, last in _groups(spans):
        seen = [share for share in shares[spans[first][0] : spans[last - 1][1]] if share is not None]
        gain = sum(seen) - sum(logps[first:last]) if seen else 0.0
        if last > len(logps) or math.isnan(gain):
            break
        gains += [gain / (last - first)] * (last - first)
    return gains


def _groups(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Return runs of tokens: those that cover no character are grouped with the next token that does, or the previous one."""
    groups: list[tuple[int, int]] = []
    first = 0
    for index, (start, end) in enumerate(spans):
        if end > start:
            groups.append((first, index + 1))
            first = index + 1
    if first < len(spans):
        begin = groups.pop()[0] if groups else 0
        groups.append((begin, len(spans)))
    return groups


def token_spans(decode: Callable[[list[int]], str], ids: Sequence[int]) -> tuple[str, list[Span]]:
    """Return the text of some ids and the span of each id, determined by decoding a few ids at a time.

    An id that completes no character has an empty span (special tokens that ``decode`` skips, the first bytes of an emoji).
    """
    ids = list(ids)
    text, spans = "", []
    start = read = 0  # ids[:read] are decoded already; ids[start:read] are the context for decoding the next ids
    known = ""
    for index in range(len(ids)):
        found = decode(ids[start : index + 1])
        # A text that ends with the replacement character is an incomplete one: wait for its remaining bytes.
        grown = len(found) > len(known) and (not found.endswith("\ufffd") or index + 1 == len(ids))
        piece = found[len(known) :] if grown else ""
        spans.append((len(text), len(text) + len(piece)))
        text += piece
        if grown:
            start, read = read, index + 1
            known = decode(ids[start:read])
    whole = decode(ids)
    return (text, spans) if text == whole else (whole, _spans_by_prefix(decode, ids, whole))


def _spans_by_prefix(decode: Callable[[list[int]], str], ids: list[int], text: str) -> list[Span]:
    """Decode every prefix: slow, but correct for decoders that depend on more than one previous token."""
    spans, end = [], 0
    for index in range(len(ids)):
        before, found = end, decode(ids[: index + 1])
        if index + 1 == len(ids):
            end = len(text)
        elif text.startswith(found):
            end = max(end, len(found))
        spans.append((before, end))
    return spans
