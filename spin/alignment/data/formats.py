"""Reading rows in other formats (ShareGPT, Alpaca, ...) as conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_text
from spin.alignment.core.text import is_unicode
from spin.alignment.data.foreign_forms import FOREIGN_FORMS, Rename
from spin.alignment.data.row_ids import source_id

Message = dict[str, str]
Turns = Literal["last", "all"]
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """A prompt and its ground truth: ``messages`` ends with the assistant turn to be played against.

    Without a ground truth, ``messages`` is the prompt alone and ends with a user turn.
    """

    prompt_id: str
    messages: list[Message]


def _messages_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return _as_messages(record["messages"], where, "messages")


def _real_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return _as_messages(record["real"], where, "real")


def _chosen_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return whole_conversation(record, "chosen", where)


def whole_conversation(record: Mapping[str, Any], column: str, where: str) -> list[Message]:
    """Return the conversation in ``column``: as it is if complete, otherwise the column ``prompt`` followed by it."""
    response, prompt = record[column], record.get("prompt")
    tail = _message_list(response, "assistant", where, column)
    if prompt is None or (tail and tail[0]["role"] != "assistant"):
        return tail
    return _message_list(prompt, "user", where, "prompt") + tail


def _message_list(value: Any, role: str, where: str, column: str) -> list[Message]:
    return [_message(role, value)] if isinstance(value, str) else _as_messages(value, where, column)


def _prompt_response_form(record: Mapping[str, Any], where: str) -> list[Message]:
    column = "response" if "response" in record else "completion"
    head = _message_list(record["prompt"], "user", where, "prompt")
    return head + _message_list(record[column], "assistant", where, column)


def _alpaca_form(record: Mapping[str, Any], where: str) -> list[Message]:
    for column in ("instruction", "input"):
        if not isinstance(record.get(column, ""), str | None):
            raise InputError(f"{where}: '{column}' is {type(record[column]).__name__}, not text: correct the row")
    messages = [_message("system", record["system"])] if record.get("system") else []
    for turn in record.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InputError(f"{where}: 'history' must contain [question, answer] pairs: correct the row")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return [*messages, _message("user", question), _message("assistant", record["output"])]


def _sharegpt_form(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    for turn in _as_list(record["conversations"], where, "conversations"):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise InputError(f"{where}: 'conversations' must contain turns with 'from' and 'value': correct the row")
        speaker = str(turn["from"])
        if speaker not in _SHAREGPT_ROLES:
            raise InputError(f"{where}: unknown speaker '{speaker}': use one of {', '.join(sorted(_SHAREGPT_ROLES))}")
        messages.append(_message(_SHAREGPT_ROLES[speaker], turn["value"]))
    return messages


def _question_answer_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return [_message("user", record["question"]), _message("assistant", record["answer"])]


def _foreign_form(rename: Rename) -> Callable[[Mapping[str, Any], str], list[Message]]:
    return lambda record, where: _read_form(rename(record, where), where)


# Columns that identify a format -> its reader. The order matters: the first format whose columns are all present is used.
FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], list[Message]]] = {
    ("real",): _real_form,
    ("chosen",): _chosen_form,
    ("messages",): _messages_form,
    ("conversations",): _sharegpt_form,
    ("instruction", "output"): _alpaca_form,
    ("question", "answer"): _question_answer_form,
    ("prompt", "response"): _prompt_response_form,
    ("prompt", "completion"): _prompt_response_form,
    **{columns: _foreign_form(rename) for columns, rename in FOREIGN_FORMS.items()},
}


def to_conversations(
    record: Mapping[str, Any], where: str, turns: Turns = "last", ground_truth_required: bool = True
) -> list[Conversation]:
    """Convert one raw row to the conversations to be played: up to the last assistant turn, or one for each (``turns="all"``).

    A user turn after the last assistant turn has no answer to learn from and is dropped. With ``ground_truth_required=False`` a
    row may lack the ground truth: a conversation without an assistant turn, or a column ``prompt`` alone (text, or turns
    that end with the user's) whose answer columns are absent or null.

    Raises:
        InputError: the format is unknown, a turn is empty or not text, roles do not alternate, or there is no assistant turn.
    """
    prompt_only = not ground_truth_required and _is_prompt_only(record)
    messages = _prompt_form(record, where) if prompt_only else _read_form(record, where)
    # A column ``prompt`` alone is kept as it is: its last user turn is the question.
    trails = len(messages) > 1 and messages[-1]["role"] == "user" and messages[-2]["role"] == "assistant"
    if trails and not prompt_only:
        messages = messages[:-1]
    check_conversation(messages, where, ground_truth_required)
    own_id = source_id(record, where)
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if messages[-1]["role"] == "user":
        return [Conversation(own_id or prompt_hash(messages), messages)]
    if turns == "last":
        ends = ends[-1:]
    conversations = []
    for number, end in enumerate(ends):
        played = messages[: end + 1]
        name = own_id or prompt_hash(played[:-1])
        # Several conversations of one row would share its id; hashed ids differ by themselves.
        suffix = f"#{number}" if turns == "all" and own_id and len(ends) > 1 else ""
        conversations.append(Conversation(name + suffix, played))
    return conversations


def _is_prompt_only(record: Mapping[str, Any]) -> bool:
    forms = (columns for columns in FORMATS if all(record.get(column) is not None for column in columns))
    return record.get("prompt") is not None and next(forms, None) is None


def _prompt_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return _message_list(record["prompt"], "user", where, "prompt")


def _read_form(record: Mapping[str, Any], where: str) -> list[Message]:
    for columns, reader in FORMATS.items():
        # Present is enough, even if null: the reader then names the row instead of guessing another format.
        if all(column in record for column in columns):
            return reader(record, where)
    known = ", ".join("+".join(columns) for columns in FORMATS)
    raise InputError(f"{where} has the columns {', '.join(record) or '(none)'}: rename them to one of {known}")


def prompt_turns(conversation: Sequence[Message]) -> list[Message]:
    """Return the prompt of a prompt row's conversation: all but the last turn, or all of it if there is no ground truth."""
    return list(conversation if conversation[-1]["role"] == "user" else conversation[:-1])


def prompt_hash(prompt: Sequence[Message]) -> str:
    """Return an id for a prompt whose row has none: a hash of its messages."""
    return hash_text(*(part for message in prompt for part in (message["role"], message["content"])))


def check_conversation(messages: Sequence[Message], where: str, ground_truth_required: bool = True) -> None:
    """Check the row contract: an optional system turn, then alternating user and assistant turns, ending with the assistant
    (or, unless ``ground_truth_required``, with the user).

    Raises:
        InputError: it does not hold; the error names ``where`` and the violation.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles and ground_truth_required:
        raise InputError(
            f"{where} has no assistant turn: there is no ground truth to learn from; remove or complete the row"
        )
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = (["user", "assistant"] * (len(body) // 2 + 1))[: len(body)]
    if not body or body != expected or (ground_truth_required and len(body) % 2):
        raise InputError(
            f"{where} has the role order {' '.join(roles) or '(no turns)'}: it must be [system] user assistant [user "
            "assistant ...]"
        )
    for number, message in enumerate(messages):
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise InputError(f"{where} has {kind} instead of text in turn {number}: correct the row")
        if not message["content"].strip() and message["role"] != "system":
            raise InputError(f"{where} has an empty {message['role']} turn (turn {number}): remove or complete the row")
        if not is_unicode(message["content"]):
            raise InputError(f"{where} has an unpaired surrogate (half a character) in turn {number}: correct the row")


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _as_list(value: Any, where: str, column: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: '{column}' is {type(value).__name__}, not a list of turns: correct the column")
    return list(value)


def _as_messages(value: Any, where: str, column: str) -> list[Message]:
    messages = []
    for turn in _as_list(value, where, column):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise InputError(f"{where}: '{column}' must contain turns with 'role' and 'content': correct the row")
        messages.append(_message(str(turn["role"]), turn["content"]))
    return messages
