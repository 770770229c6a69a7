"""Conversations that a source contains as one text: transcripts of ``Human:`` and ``Assistant:``, and printed lists of turns."""

from __future__ import annotations

import re

from spin.alignment.data.turns import Message, text_turn

_PROMPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_WHOLE = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
# A list of turns as JSON, or as Python prints it.
_KEY = r"""['"](?:role|content|from|value)['"]\s*:"""
_TURNS = re.compile(rf"\s*\[\s*\{{\s*{_KEY}.*{_KEY}.*\}}\s*\]\s*", re.DOTALL)


def is_transcript(text: str) -> bool:
    """Return whether a text is a dialogue in the form of Anthropic's HH data."""
    return _WHOLE.match(text) is not None


def is_transcript_prompt(text: str) -> bool:
    """Return whether a text is such a dialogue and ends where the response starts."""
    return _PROMPT.fullmatch(text) is not None


def transcript_turns(text: str) -> list[Message]:
    """Return the turns of a transcript: paragraphs that start with ``Human:`` or ``Assistant:``."""
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    return [text_turn(_ROLES[speaker], said) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]


def is_list_of_turns(text: str) -> bool:
    """Return whether a text is a printed list of turns, as tables of text contain it."""
    return text.lstrip()[:1] == "[" and _TURNS.fullmatch(text) is not None
