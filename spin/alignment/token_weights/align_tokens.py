"""Log-probs of one tokenizer's tokens given to another's, by the characters both stand for. Pure functions on spans.

A *span* is ``(start, end)`` in characters of the response text. A teacher's token gives each of its characters an equal share of
its log-prob, and a student's token takes the shares of its own characters: where both tokenizers cut at the same places the
whole log-prob moves over, and always the sum over the response stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Span = tuple[int, int]


def character_logps(logps: Sequence[float], spans: Sequence[Span], length: int) -> list[float | None]:
    """Return the log-prob (nats) of each of ``length`` characters: NaN from the first token on that has no log-prob, ``None``
    where no token stands for a character (white space that a chat template strips).

    A token without characters of its own (the space that some tokenizers put in front) joins the character it stands at.
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
    """Return the gain ``log pi_teacher - log pi_student`` (nats) of the first student tokens: those that both models scored.

    ``shares`` are the teacher's by character, ``logps`` and ``spans`` the student's by token. Tokens that only together make a
    character (the bytes of an emoji) share their gain evenly; where the teacher saw no character there is nothing to gain, 0.
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
    """Return runs of tokens: those without characters of their own go with the next that has some, or with the one before."""
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
    """Return the text of some ids and the span of each, found by decoding a few ids at a time.

    An id that completes no character has an empty span (special tokens that ``decode`` leaves out, the first bytes of an emoji).
    """
    ids = list(ids)
    text, spans = "", []
    start = read = 0  # the text of ids[:read] is known; ids[start:read] is what the next ids are decoded behind
    known = ""
    for index in range(len(ids)):
        found = decode(ids[start : index + 1])
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
    """The slow way, for decoders that look further back than one token."""
    spans, end = [], 0
    for index in range(len(ids)):
        before, found = end, decode(ids[: index + 1])
        if index + 1 == len(ids):
            end = len(text)
        elif text.startswith(found):
            end = max(end, len(found))
        spans.append((before, end))
    return spans
