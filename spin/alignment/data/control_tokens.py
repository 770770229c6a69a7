"""Control tokens in text: text that would be encoded as a token that structures the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from spin.alignment.data.tokenizer_calls import encode_texts

# Stands between the first and second character of a control token that has to be encoded as text; not a character of any text.
MARK = "\ufdd0"


class ControlTokens:
    """The control tokens of a tokenizer, found in text.

    All special tokens count, and added tokens that mark a part of a conversation, such as the ``<think>`` of models that do not
    declare it special: their ``soft`` tokens. Ordinary entries among the added tokens (runs of spaces, HTML tags) do not.
    """

    def __init__(self, tokenizer: Any, template: str, ends: Iterable[int], in_responses: str) -> None:
        """``in_responses`` is what the template writes around the text of a response: control tokens in it, and soft ones,
        belong in responses."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ends_and_starts = {*ends, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
        self._never = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends_and_starts))}
        special = {str(token.content) for token in added.values() if token.special}
        special |= self._never | {str(token) for token in tokenizer.all_special_tokens}
        self._soft = {
            str(token.content)
            for token in added.values()
            if str(token.content) not in special and _is_marker(str(token.content), template)
        }
        self._allowed = {token for token in special if token in in_responses} | self._soft
        self._allowed |= {token for token in special if _STRUCTURE.search(token)}
        self._allowed -= self._never
        self._special = _pattern(special)
        self._in_response = _pattern(special - self._allowed)
        self._soft_pattern = _pattern(self._soft)
        self._normalize = _normalizer(tokenizer)

    def found_in(self, text: str, is_response: bool) -> str | None:
        """Return the first control token in a text that must not contain it, or None.

        Soft tokens do not count: in a response they are meant, elsewhere :meth:`marked` has them encoded as text.
        :data:`MARK` itself counts.
        """
        pattern = self._in_response if is_response else self._special
        found = pattern.search(text) or (pattern.search(self._normalize(text)) if self._normalize else None)
        if found is None and MARK in text:
            return "U+FDD0"
        return found[0] if found else None

    def spelled(self, text: str) -> str:
        """Return a text with :data:`MARK` inside every control token except markers of the parts of a response."""
        return self._in_response.sub(lambda found: found[0][0] + MARK + found[0][1:], text.replace(MARK, ""))

    def marked(self, text: str) -> str:
        """Return a text with :data:`MARK` inside every soft token, to be encoded in pieces between the marks."""
        if not self._soft:  # a pattern that never matches would still be tried at every character
            return text
        return self._soft_pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)


def ids_of_pieces(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, encoded in pieces between the marks, which are not part of it.

    Control tokens outside the marks are those of a template, also for a tokenizer that is set to split them.
    """
    return ids_of_texts(tokenizer, [text])[0]


def ids_of_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return :func:`ids_of_pieces` of several texts, from a single call of the tokenizer."""
    split = [text.split(MARK) for text in texts]
    pieces = [piece for some in split for piece in some]
    encoded = iter(encode_texts(tokenizer, pieces))
    return [[token for _ in some for token in next(encoded)] for some in split]


# The parts of a response, whether or not a tokenizer declares their markers special.
_STRUCTURE = re.compile(r"think|thought|reason|channel|message|tool_call|python_tag|(?<!tool_)response", re.IGNORECASE)

_BARS = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)  # such as <|fim_prefix|>


def _is_marker(token: str, template: str) -> bool:
    """Return whether an added token marks a part of a conversation: the template writes it, or its name or form says so."""
    looks = bool(re.search(r"[<\[|｜]", token)) and len(token) > 2
    return looks and (token in template or _STRUCTURE.search(token) is not None or _BARS.fullmatch(token) is not None)


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    # Longer tokens first, so that the one that the tokenizer would take is named; without tokens nothing matches.
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _normalizer(tokenizer: Any) -> Any:
    """Return the function that a tokenizer applies to text before it looks for tokens declared as normalized, if any."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    if normalizer is None or not any(token.special and token.normalized for token in added.values()):
        return None
    return normalizer.normalize_str
