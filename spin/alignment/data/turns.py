"""Turns of a conversation: reading them in foreign forms, and the row contract that they must keep.

A turn has ``role`` and ``content`` and, only where the source has them, ``reasoning_content`` (the thoughts before the response),
``tool_calls`` (JSON text of a list), ``name`` and ``tool_call_id``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_text
from spin.alignment.core.text import is_unicode
from spin.alignment.data.columns import REASONING_KEYS
from spin.alignment.data.refused_columns import is_empty

Message = dict[str, str]
# Fields that a turn has only where its source has them.
OPTIONAL_FIELDS = ("reasoning_content", "tool_calls", "name", "tool_call_id")
# Key of an assistant turn that is context only, while a row is being read.
CONTEXT_ONLY = "context_only"
_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}
_SPEAKERS = {
    "assistant": "assistant",
    "developer": "system",
    "function": "tool",
    "function_call": "assistant",
    "function_response": "tool",
    "gpt": "assistant",
    "human": "user",
    "observation": "tool",
    "system": "system",
    "tool": "tool",
    "user": "user",
}
_TRAINED_KEYS = (
    *("weight", "loss_weight", "loss_mask", "loss", "compute_loss"),
    *("train", "trainable", "is_trainable", "training", "train_on", "train_on_turn", "learn"),
)
# Keys of a turn that are read here.
TURN_KEYS = {"role", "content", "from", "value", "function_call", *REASONING_KEYS, *_TRAINED_KEYS, *OPTIONAL_FIELDS}
# Which turns may follow a turn; the first turn is the system's or the user's.
_FOLLOWING = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def read_turns(value: Any, where: str, column: str) -> list[Message]:
    """Read a list of turns of ``role`` and ``content``, or of ``from`` and ``value`` (ShareGPT).

    Raises:
        InputError: it is not such a list, or a turn is not text.
    """
    keys = "'from' and 'value'" if column == "conversations" else "'role' and 'content'"
    if isinstance(value, Mapping):  # a single turn, as in LLaMA-Factory's preference data
        value = [value]
    if value is None:
        raise InputError(f"{where}: '{column}' is null: complete or remove the row")
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: '{column}' is {type(value).__name__}, not a list of turns: correct the column")
    messages = []
    for turn in value:
        # A dict is recognised faster than another mapping.
        if not isinstance(turn, dict | Mapping) or not (_has_role(turn) or ("from" in turn and "value" in turn)):
            raise InputError(f"{where}: '{column}' must contain turns with {keys}: correct the row")
        messages.append(_read_turn(turn, where))
    return messages


def _has_role(turn: Mapping[str, Any]) -> bool:
    # The APIs of tools leave out the content of a turn that only calls one.
    return "role" in turn and ("content" in turn or not is_empty(turn.get("tool_calls")) or "function_call" in turn)


def _read_turn(turn: Mapping[str, Any], where: str) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if len(turn) == 2 and isinstance(role, str) and isinstance(content, str):
        return {"role": _ROLES.get(role, role), "content": content}  # by far the most common turn: role and text alone
    sharegpt = role is None and "from" in turn
    message = _sharegpt_turn(turn, where) if sharegpt else text_turn(_role(turn), content)
    if len(turn) == 2 and len(message) == 2 and isinstance(message["content"], str):
        return message
    said = [turn[name] for name in ("content", "value") if not is_empty(turn.get(name))]
    if len(said) == 2 and said[0] != said[1]:
        raise InputError(f"{where} has a turn with different texts in 'content' and 'value': keep one of them")
    thoughts = _split_parts(message, where)
    message |= _reasoning(turn, message["role"], thoughts, where)
    if calls := _tool_calls(turn, where) or message.pop("tool_calls", None):
        message["tool_calls"] = calls
        message["content"] = "" if message["content"] is None else message["content"]
        if message["role"] != "assistant":
            raise InputError(f"{where} has tool_calls in a {message['role']} turn: only the assistant calls tools")
    for name in ("name", "tool_call_id"):
        if not is_empty(turn.get(name)):
            message[name] = str(turn[name])
    if message["role"] == "assistant" and not _is_trained(turn, "assistant", where):
        message[CONTEXT_ONLY] = "yes"
    elif message["role"] != "assistant" and _is_trained(turn, message["role"], where):
        key = next(name for name in _TRAINED_KEYS if turn.get(name))
        raise InputError(
            f"{where} has a {message['role']} turn with '{key}': only assistant turns are trained on; remove the key"
        )
    return message


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn["role"])
    return _ROLES.get(role, role)


def _sharegpt_turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker = str(turn["from"])
    if speaker not in _SPEAKERS:
        raise InputError(f"{where}: unknown speaker '{speaker}': use one of {', '.join(sorted(_SPEAKERS))}")
    if speaker == "function_call":
        calls = turn["value"] if isinstance(turn["value"], str) else None
        return {"role": "assistant", "content": "", "tool_calls": json_list(calls, where, "function_call", _as_call)}
    return {"role": _SPEAKERS[speaker], "content": turn["value"]}


def _split_parts(message: dict[str, Any], where: str) -> str | None:
    """Join the text parts of a content list in place; return the text of its thoughts, if it has any."""
    if not isinstance(message["content"], list | tuple):
        return None
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in message["content"]:
        # Parquet fills in the keys of other parts with nulls.
        known = present_fields(part) if isinstance(part, Mapping) else {"type": type(part).__name__}
        kind = known.pop("type", "text")
        if kind in texts and known.keys() == {kind} and isinstance(known[kind], str):
            texts[kind].append(known[kind])
            continue
        name = kind if kind not in texts else ", ".join(sorted(known)) or "no text"
        turn = f"{'an' if message['role'] == 'assistant' else 'a'} {message['role']} turn"
        raise InputError(f"{where} has {turn} with a part of its content that is not text ({name}): remove the row")
    message["content"] = "".join(texts["text"])
    return "".join(texts["thinking"]) or None


def _reasoning(turn: Mapping[str, Any], role: str, thoughts: str | None, where: str) -> Message:
    found = {name: turn[name] for name in REASONING_KEYS if not is_empty(turn.get(name))}
    texts = [*found.values(), *([thoughts] if thoughts else [])]
    if not texts:
        return {}
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: '{next(iter(found))}' of a turn is not text: correct the row")
    if role != "assistant":
        raise InputError(f"{where} has '{next(iter(found), 'thinking')}' in a {role} turn: only the assistant thinks")
    if len(set(texts)) > 1:
        raise InputError(f"{where} has different texts in {' and '.join(found)} of one turn: keep one of them")
    return {"reasoning_content": texts[0]}


def _tool_calls(turn: Mapping[str, Any], where: str) -> str | None:
    calls = json_list(turn.get("tool_calls"), where, "tool_calls", dict)
    call = turn.get("function_call")
    if is_empty(call):
        return calls
    if calls:
        raise InputError(f"{where} has both tool_calls and function_call in one turn: keep tool_calls")
    return json_list([call], where, "function_call", _as_call)


def _as_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(call)}


def json_list(value: Any, where: str, name: str, convert: Any) -> str | None:
    """Return a list of objects, or its JSON text, as JSON text; None if it is empty.

    Null values inside are removed: parquet writes them for keys that only other rows have. ``convert`` is applied to each object.

    Raises:
        InputError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: '{name}' is not JSON ({error}): correct the row") from error
    value = [value] if isinstance(value, Mapping) else value
    if is_empty(value):
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{where}: '{name}' is not a list of objects: correct the row")
    try:
        text = json.dumps([without_nulls(convert(item)) for item in value], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: '{name}' cannot be written as JSON ({error}): correct the row") from error
    if not is_unicode(text):
        raise InputError(f"{where} has an unpaired surrogate (half a character) in '{name}': correct the row")
    return text


def without_nulls(value: Any) -> Any:
    """Return nested lists and objects without the keys whose value is null."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _is_trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Return whether a turn is to be trained on, as its keys say; without any, assistant turns are."""
    given = {name: turn[name] for name in _TRAINED_KEYS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(f"{where} has a turn with '{name}' {value!r}: only 0 and 1 (false and true) are supported")
    if len({bool(value) for value in given.values()}) > 1:
        raise InputError(f"{where} has a turn in which {' and '.join(given)} contradict each other: keep one of them")
    return all(given.values()) if given else role == "assistant"


def text_turn(role: str, content: Any) -> Message:
    """Return a turn of text; its content is checked by :func:`check_conversation`."""
    return {"role": role, "content": content}


def take_context_marks(messages: Iterable[Message]) -> set[int]:
    """Remove the marks of assistant turns that are not to be trained on; return the places of these turns."""
    return {number for number, message in enumerate(messages) if message.pop(CONTEXT_ONLY, None)}


def present_fields(turn: Mapping[str, Any]) -> Message:
    """Return a turn without null fields, which parquet writes where another turn has the field."""
    return {name: value for name, value in turn.items() if value is not None}


def answer_text(turn: Mapping[str, Any]) -> str:
    """Return the text of a response for scorers: its content, followed by its tool calls (JSON), if there are any."""
    return "\n".join(part for part in (turn["content"], turn.get("tool_calls")) if part)


def question(prompt: Sequence[Mapping[str, Any]]) -> str:
    """Return the ``prompt`` of a rule: the text of the last user turn, or of the last turn if there is none."""
    turns = [turn for turn in prompt if turn.get("role") == "user"] or prompt
    return turns[-1]["content"] if turns else ""


def prompt_turns(conversation: Sequence[Message]) -> list[Message]:
    """Return the prompt of a prompt row's conversation: all but the last turn, or all of it if there is no ground truth."""
    return list(conversation if conversation[-1]["role"] != "assistant" else conversation[:-1])


def turn_texts(turn: Mapping[str, Any]) -> list[str]:
    """Return every text of a turn, for hashes: role, content, and the names and texts of the optional fields that it has."""
    texts = [turn["role"], turn["content"]]
    if len(turn) > 2:
        texts += [text for name in OPTIONAL_FIELDS if turn.get(name) is not None for text in (name, turn[name])]
    return texts


def prompt_hash(prompt: Sequence[Message], *settings: str | None) -> str:
    """Return an id for a prompt whose row has none: a hash of its messages, and of ``settings`` such as its tools."""
    texts = [part for message in prompt for part in turn_texts(message)]
    return hash_text(*texts, *(setting for setting in settings if setting is not None))


def check_conversation(messages: Sequence[Mapping[str, Any]], where: str, ground_truth_required: bool = True) -> None:
    """Check the row contract: an optional system turn, then alternating user and assistant turns, ending with the assistant
    (or, unless ``ground_truth_required``, with the user or a tool). Tool turns stand between two assistant turns.

    Raises:
        InputError: it does not hold; the error names ``where`` and the violation.
    """
    roles = [message["role"] for message in messages]
    if unknown := [role for role in roles if role not in _FOLLOWING]:
        raise InputError(f"{where} has a turn with the role '{unknown[0]}': use one of system, user, assistant, tool")
    if "assistant" not in roles and ground_truth_required:
        raise InputError(
            f"{where} has no assistant turn: there is no ground truth to learn from; remove or complete the row"
        )
    in_order, before = True, None
    for role in roles:
        in_order = in_order and role in _FOLLOWING.get(before, ())
        before = role
    ends = ("assistant",) if ground_truth_required else ("assistant", "user", "tool")
    if not in_order or not roles or roles[-1] not in ends:
        raise InputError(
            f"{where} has the role order {' '.join(roles) or '(no turns)'}: it must be [system] user assistant [user "
            "assistant ...], with tool turns only between two assistant turns"
        )
    for number, message in enumerate(messages):
        _check_texts(message, number, where)


def _check_texts(message: Mapping[str, Any], number: int, where: str) -> None:
    role, content = message["role"], message["content"]
    if not isinstance(content, str):
        found = "null" if content is None else type(content).__name__
        raise InputError(f"{where} has {found} instead of text in turn {number}: correct the row")
    may_be_empty = role in ("system", "tool") or bool(message.get("tool_calls"))
    if (not content or content.isspace()) and not may_be_empty:
        raise InputError(f"{where} has an empty {role} turn (turn {number}): remove or complete the row")
    if not is_unicode(content) or (len(message) > 2 and not all(map(is_unicode, turn_texts(message)[2:]))):
        raise InputError(f"{where} has an unpaired surrogate (half a character) in turn {number}: correct the row")
