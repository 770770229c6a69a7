"""A conversation as text and as token ids, for models that score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.core.errors import InputError


def plain_text(prompt: Sequence[dict[str, str]]) -> str:
    """Return a conversation as one text: a single turn as it is, several with their roles and a blank line between."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def template_ids(tokenizer: Any, prompt: Sequence[dict[str, str]], response: str | None, where: str) -> list[int]:
    """Return the ids of a whole conversation, or of its prompt with the opening of the response (``None``).

    Raises:
        InputError: the template refuses the conversation.
    """
    turns = [*prompt, *([] if response is None else [{"role": "assistant", "content": response}])]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=response is None, return_dict=False
        )
    except Exception as error:  # a template may raise anything; what it says is what the user needs
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses the turns '{roles}' ({error}): mend the row or "
            "choose another reward model"
        ) from error
    return ids
