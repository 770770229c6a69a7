"""A conversation as text and as token ids, for scoring models."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.control_tokens import ControlTokens, ids_of_pieces
from spin.alignment.data.turns import answer_text, present_fields


def plain_text(prompt: Sequence[dict[str, str]]) -> str:
    """Return a conversation as text: a single turn as it is, several turns with their roles, separated by blank lines."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {answer_text(turn)}" for turn in prompt)


def template_ids(
    tokenizer: Any, prompt: Sequence[dict[str, str]], response: str | None, where: str, tools: str | None = None
) -> list[int]:
    """Return the ids of a whole conversation, or of its prompt and the generation prompt if ``response`` is ``None``.

    A control token of the scoring model in a text stays text: a policy could otherwise write turns of its own.

    Raises:
        InputError: the template rejects the conversation.
    """
    turns = [
        *map(_as_template_reads, prompt),
        *([] if response is None else [{"role": "assistant", "content": response}]),
    ]
    control = _control_tokens(tokenizer)
    turns = [{**turn, "content": control.spelled(turn.get("content") or "")} for turn in turns]
    given = {"tools": json.loads(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=response is None, **given)
    except Exception as error:  # a template may raise anything, and its message is what the user needs
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"{where}: the chat template of {tokenizer.name_or_path} rejects the turns '{roles}' ({error}): fix the row or "
            "choose another reward model"
        ) from error
    return ids_of_pieces(tokenizer, str(text))


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any) -> ControlTokens:
    return ControlTokens(tokenizer, str(tokenizer.chat_template), [], "")


def _as_template_reads(turn: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = present_fields(turn)
    return found | ({"tool_calls": json.loads(found["tool_calls"])} if "tool_calls" in found else {})
