"""Reading rows in other formats (ShareGPT, Alpaca, ...) as conversations."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.data.columns import (
    EXTRA_COLUMNS,
    REASONING_KEYS,
    SYSTEM_COLUMNS,
    Record,
    RowNotes,
    has_rare_columns,
    other_columns,
    read_extra_columns,
    to_json,
)
from spin.alignment.data.foreign_forms import FOREIGN_FORMS
from spin.alignment.data.refused_columns import LABEL_COLUMNS, check_turn_key, is_empty
from spin.alignment.data.row_ids import source_id
from spin.alignment.data.transcripts import is_list_of_turns, is_transcript, is_transcript_prompt, transcript_turns
from spin.alignment.data.turns import (
    TURN_KEYS,
    Message,
    check_conversation,
    json_list,
    prompt_hash,
    prompt_turns,
    read_turns,
    take_context_marks,
    text_turn,
)

Turns = Literal["last", "all"]
# Columns of prompt rows that exist only in files in which some row has them.
CARRIED_COLUMNS = ("tools", "chat_template_kwargs", EXTRA_COLUMNS)
# Columns that may contain the prompt of a preference row, in this order.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "conversations", "messages")


@dataclass(frozen=True)
class Conversation:
    """A prompt and its ground truth: ``messages`` ends with the assistant turn to be played against.

    Without a ground truth, ``messages`` is the prompt alone and ends with a user (or tool) turn.

    Attributes:
        tools, chat_template_kwargs: JSON texts that the chat template reads, or None.
        extra_columns: the row's other columns, for scorers.
    """

    prompt_id: str
    messages: list[Message]
    tools: str | None = None
    chat_template_kwargs: str | None = None
    extra_columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """A hash of everything that the prompt consists of."""
        return prompt_hash(prompt_turns(self.messages), self.tools, self.chat_template_kwargs)

    def row(self) -> dict[str, Any]:
        """Return the prompt row: ``prompt_id``, ``chosen``, and those of :data:`CARRIED_COLUMNS` that it has."""
        if not (self.tools or self.chat_template_kwargs or self.extra_columns):
            return {"prompt_id": self.prompt_id, "chosen": self.messages}
        extra = to_json(self.extra_columns) if self.extra_columns else None
        carried = dict(zip(CARRIED_COLUMNS, (self.tools, self.chat_template_kwargs, extra), strict=True))
        columns = {name: value for name, value in carried.items() if value is not None}
        return {"prompt_id": self.prompt_id, "chosen": self.messages, **columns}


def _messages_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return read_turns(record["messages"], where, "messages")


def _real_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return read_turns(record["real"], where, "real")


def _chosen_form(record: Record, where: str) -> list[Message]:
    return whole_conversation(record, "chosen", where)


def whole_conversation(record: Record, column: str, where: str) -> list[Message]:
    """Return the conversation in ``column``: as it is if complete, otherwise the row's prompt followed by it.

    The prompt is in one of the columns prompt, instruction (with input), question, conversations, messages. A text without any
    of them, or the prompt, may be a transcript of ``Human:`` and ``Assistant:``.
    """
    tail = message_list(record[column], "assistant", where, column)
    text = record[column]
    if isinstance(text, str) and is_transcript(text):
        tail = transcript_turns(text)
    if tail and tail[0]["role"] != "assistant":
        _check_same_prompt(tail, record, where, column)
        return tail
    prompt = next((name for name in PROMPT_COLUMNS if record.get(name) is not None), None)
    if prompt is None:
        return tail
    if prompt == "instruction":
        return [*_alpaca_prompt(record, where), *tail]
    head = record[prompt]
    if isinstance(head, str) and is_transcript_prompt(head):  # TIS-DPO's: it ends where the response starts
        return [*transcript_turns(head)[:-1], *tail]
    return message_list(head, "user", where, prompt) + tail


def _check_same_prompt(messages: list[Message], record: Record, where: str, column: str) -> None:
    """Refuse turns in the column ``prompt`` that a whole conversation does not start with. A text there is ignored, as by other
    tools: a copy of a turn, of the rendered prompt, or what somebody made the conversation from."""
    if not isinstance(record.row.get("prompt"), list | tuple):
        return
    prompt = read_turns(record["prompt"], where, "prompt")
    if prompt and [dict(turn) for turn in prompt] != messages[: len(prompt)]:
        raise InputError(
            f"{where}: '{column}' is a whole conversation, but does not start with the turns in 'prompt': keep one of the two"
        )


def message_list(value: Any, role: str, where: str, column: str) -> list[Message]:
    """Return a text as one turn of ``role``, and a list of turns as it is.

    Raises:
        InputError: the text is that of a list of turns, as tables of text contain it.
    """
    if isinstance(value, str) and is_list_of_turns(value):
        raise InputError(
            f"{where}: '{column}' is the text of a list of turns, not the list: write the rows as parquet or JSON lines"
        )
    return [text_turn(role, value)] if isinstance(value, str) else read_turns(value, where, column)


def _prompt_response_form(record: Mapping[str, Any], where: str) -> list[Message]:
    column = "response" if "response" in record else "completion"
    head = message_list(record["prompt"], "user", where, "prompt")
    return head + message_list(record[column], "assistant", where, column)


def _alpaca_prompt(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = []
    history = record.get("history") or []
    for turn in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InputError(f"{where}: 'history' must contain [question, answer] pairs: correct the row")
        messages += [text_turn("user", turn[0]), text_turn("assistant", turn[1])]
    parts = [record.get(column) for column in ("instruction", "input")]
    for column in ("instruction", "input"):
        if not isinstance(record.get(column, ""), str | None):
            raise InputError(f"{where}: '{column}' is {type(record[column]).__name__}, not text: correct the row")
    return [*messages, text_turn("user", "\n\n".join(part for part in parts if part))]


def _alpaca_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return [*_alpaca_prompt(record, where), text_turn("assistant", record["output"])]


def _sharegpt_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return read_turns(record["conversations"], where, "conversations")


def _question_answer_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return [text_turn("user", record["question"]), text_turn("assistant", record["answer"])]


# Columns that identify a format -> its reader. The order matters: the first format whose columns are all present is used.
# A column that no reader reads is checked, carried or ignored as ``columns.py`` says.
FORMATS: dict[tuple[str, ...], Callable[[Record, str], list[Message]]] = {
    ("real",): _real_form,
    ("chosen",): _chosen_form,
    ("messages",): _messages_form,
    ("conversations",): _sharegpt_form,
    ("instruction", "output"): _alpaca_form,
    ("question", "answer"): _question_answer_form,
    ("prompt", "response"): _prompt_response_form,
    ("prompt", "completion"): _prompt_response_form,
}


def to_conversations(
    row: Mapping[str, Any],
    where: str,
    turns: Turns = "last",
    ground_truth_required: bool = True,
    notes: RowNotes | None = None,
) -> list[Conversation]:
    """Convert one raw row to the conversations to be played: up to the last assistant turn, or one for each (``turns="all"``).

    Turns after the last answer have none to learn from and are dropped, and so is an answer whose turn has the weight 0. With
    ``ground_truth_required=False`` a row may lack the ground truth: a conversation without an assistant turn, or a column
    ``prompt`` alone (text, or turns that end with the user's) whose answer columns are absent or null. A row whose label is false
    (an unpaired bad response) has no ground truth: it gives no conversation and is counted in ``notes``.

    Raises:
        InputError: the format is unknown, a column would change what is trained, a turn is empty or not text, roles do not
            alternate, or there is no assistant turn.
    """
    row = _under_known_names(row, where)
    record, notes = Record(row), notes or RowNotes()
    rare = has_rare_columns(tuple(row))
    if rare and read_label(record, where) is False:
        notes.label_false += 1
        return []
    prompt_only = not ground_truth_required and _is_prompt_only(row)
    messages = _prompt_form(record, where) if prompt_only else _read_form(record, where)
    messages = with_system(messages, record, where) if rare else messages
    context_only = take_context_marks(messages)
    # A column ``prompt`` alone is kept as it is: its last user turn is the question.
    if not prompt_only:
        messages = _until_last_answer(messages)
        if rare:
            _add_reasoning(messages, record, where)
    check_conversation(messages, where, ground_truth_required)
    carried = template_columns(record, where) if rare else (None, None)
    extra = read_extra_columns(record.get(EXTRA_COLUMNS), where) if rare else {}
    extra |= other_columns(record, where, notes)
    check_turn_keys(record, where, notes)
    ends = [index for index, turn in enumerate(messages) if turn["role"] == "assistant" and index not in context_only]
    if messages[-1]["role"] != "assistant":
        ends = [len(messages) - 1]
    elif not ends:
        raise InputError(f"{where} has no assistant turn to train on, all of them have weight 0: remove the row")
    elif turns == "last":
        ends = ends[-1:]
    own_id = source_id(row, where)
    conversations = []
    for number, end in enumerate(ends):
        played = messages[: end + 1]
        # Several conversations of one row would share its id; hashed ids differ by themselves.
        suffix = f"#{number}" if turns == "all" and len(ends) > 1 else ""
        name = f"{own_id}{suffix}" if own_id else prompt_hash(prompt_turns(played), *carried)
        conversations.append(Conversation(name, played, *carried, extra))
    return conversations


def _format_of(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the key of :data:`FORMATS` that a row with these columns is read by; None if it is in none of them.

    Present is enough, even if null: the reader then names the row instead of guessing another format.
    """
    return next(iter(_formats_in(names)), None)


@functools.lru_cache(maxsize=1024)
def _formats_in(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the keys of :data:`FORMATS` whose columns are all among these."""
    return [columns for columns in FORMATS if set(columns) <= set(names)]


def _under_known_names(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a row in a form of another tool (``foreign_forms.py``) under the names that :data:`FORMATS` reads."""
    if _format_of(tuple(row)):
        return row
    for columns, rename in FOREIGN_FORMS.items():
        if all(column in row for column in columns):
            return rename(row, where)
    return row


def _until_last_answer(messages: list[Message]) -> list[Message]:
    """Drop what follows the last answer: a user turn, the replies of tools, or both."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return messages
    if roles[-1] == "assistant":
        return messages
    end = len(roles) - roles[::-1].index("assistant")
    return (
        messages[:end] if re.fullmatch(r"(tool )*(user )?", "".join(f"{role} " for role in roles[end:])) else messages
    )


def _is_prompt_only(row: Mapping[str, Any]) -> bool:
    if row.get("prompt") is None:
        return False
    return not any(all(row[column] is not None for column in columns) for columns in _formats_in(tuple(row)))


def _prompt_form(record: Mapping[str, Any], where: str) -> list[Message]:
    return message_list(record["prompt"], "user", where, "prompt")


def _read_form(record: Record, where: str) -> list[Message]:
    if columns := _format_of(tuple(record.row)):
        return FORMATS[columns](record, where)
    known = ", ".join("+".join(columns) for columns in (*FORMATS, *FOREIGN_FORMS))
    if "prompt" in record:
        known += "; or keep prompts without an answer (spin/reformat.py --allow_prompts)"
    raise InputError(f"{where} has the columns {', '.join(record) or '(none)'}: rename them to one of {known}")


def with_system(messages: list[Message], record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the conversation with the system prompt of the row's own column, if it has one.

    Raises:
        InputError: it is not text, or the conversation or another column has a different one.
    """
    found = {name: record[name] for name in SYSTEM_COLUMNS if not is_empty(record.get(name))}
    if not found:
        return messages
    name, text = next(iter(found.items()))
    if not isinstance(text, str):
        raise InputError(f"{where}: '{name}' is {type(text).__name__}, not text: correct the row")
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if any(other != text for other in (*found.values(), *own)):
        both = " and ".join([*found, *(["a system turn"] if own else [])])
        raise InputError(f"{where} has different system prompts ({both}): keep one of them")
    return messages if own else [text_turn("system", text), *messages]


def _add_reasoning(messages: list[Message], record: Mapping[str, Any], where: str) -> None:
    """Put the thoughts that stand in a column of their own into the answer, if the conversation ends with one."""
    if not messages or messages[-1]["role"] != "assistant":
        return
    for name in REASONING_KEYS:
        text = record.get(name)
        if is_empty(text):
            continue
        if not isinstance(text, str):
            raise InputError(f"{where}: '{name}' is {type(text).__name__}, not text: correct the row")
        if messages[-1].setdefault("reasoning_content", text) != text:
            raise InputError(f"{where} has different thoughts in '{name}' and elsewhere in the row: keep one of them")


def check_turn_keys(record: Record, where: str, notes: RowNotes) -> None:
    """Check the keys of all turns in the columns that were read, and note those that are ignored.

    Raises:
        InputError: a key would change what is trained; it is named.
    """
    for name in record.used:
        value = record.row[name]
        if isinstance(value, str):
            continue
        for turn in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(turn, dict | Mapping) or turn.keys() <= TURN_KEYS or not ({"role", "from"} & turn.keys()):
                continue
            for key in turn.keys() - TURN_KEYS:
                if not is_empty(turn[key]):
                    check_turn_key(key, turn[key], where)
                    notes.turn_keys.add(key)


def template_columns(record: Mapping[str, Any], where: str) -> tuple[str | None, str | None]:
    """Return the columns ``tools`` (or ``functions``) and ``chat_template_kwargs`` as JSON text, None where there are none.

    Raises:
        InputError: they are not lists of objects, or an object.
    """
    tools = json_list(record.get("tools"), where, "tools", dict)
    functions = json_list(record.get("functions"), where, "functions", _as_function)
    if tools and functions:
        raise InputError(f"{where} has both tools and functions: keep tools")
    settings = json_list(record.get("chat_template_kwargs"), where, "chat_template_kwargs", dict)
    # One object is read as a list of one.
    values = json.loads(settings) if settings else [None]
    if len(values) != 1:
        raise InputError(f"{where}: 'chat_template_kwargs' is not one object: correct the row")
    return tools or functions, json.dumps(values[0], ensure_ascii=False) if values[0] else None


def _as_function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(function)}


def read_label(record: Mapping[str, Any], where: str) -> bool | None:
    """Return whether the response of an unpaired preference row is good; None if the row has no label.

    Raises:
        InputError: the label is neither true nor false.
    """
    for name in LABEL_COLUMNS:
        value = record.get(name)
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        if isinstance(value, bool):
            return value
        if not is_empty(value):
            raise InputError(
                f"{where} has '{name}' {value!r}, which is neither true nor false: use true for a good and false for a bad "
                f"response, rename the column, or remove it (spin/reformat.py --ignore_columns {name})"
            )
    return None
