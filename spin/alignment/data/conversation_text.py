"""The text of a conversation: what a chat template makes of a prompt, and how a response continues it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_template import ChatTemplate, json_value, template_turn
from spin.alignment.data.control_tokens import ControlTokens, ids_of_pieces
from spin.alignment.data.end_of_turn import end_of_turn_id
from spin.alignment.data.thoughts import (
    OpenedThought,
    bare_text,
    behind_thought,
    ends_with_thought,
    has_thought,
    is_empty_thought,
    leading_thought,
    opened_thought,
)
from spin.alignment.data.turns import Message

SystemPolicy = Literal["keep", "fold"]
SYSTEM_POLICIES: tuple[SystemPolicy, ...] = ("keep", "fold")
# Text that no template contains itself: rendered to see what a template does with a turn.
_PROBE = "Reply 7"
# Texts of a user's or a tool's turn.
_MARKED = {"content", "name", "tool_call_id"}


class RowRefused(InputError):
    """A conversation that cannot be encoded faithfully: a reason to leave out its row, and to count it."""


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Prepend the text of the leading system turn to the first user turn, separated by a blank line."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


class ConversationText:
    """Renders prompts and responses such that they add up to the template's own text of the conversation.

    Attributes:
        end_id: the end-of-turn id that the template writes after a response (the EOS if it writes none).
        stop_ids: the ids that end a sampled response: end-of-turn, EOS and those that the model's files name, ascending.
        foreign_ends: ids that the model's files name although the tokenizer has no control token with that id.
        thought: the thought that the generation prompt opens, if any.
        response_prefix, response_suffix: what the template writes around the text of a response.
    """

    def __init__(self, template: ChatTemplate, system: SystemPolicy, end_ids: Iterable[int]) -> None:
        """Probe the template once; ``end_ids`` are further ids that end a response.

        Raises:
            InputError: the template cannot be rendered, or no token ends a turn.
        """
        if system not in SYSTEM_POLICIES:
            raise InputError(f"unknown system policy '{system}': choose one of {', '.join(SYSTEM_POLICIES)}")
        self.template, self.system, self.name = template, system, template.name
        self._thoughts: dict[str, OpenedThought | None] = {}
        tokenizer = template.tokenizer
        control = {int(token) for token in getattr(tokenizer, "added_tokens_decoder", {})} | {
            *tokenizer.all_special_ids
        }
        # An end that is an ordinary word would cut responses anywhere: such a list belongs to another tokenizer.
        self.foreign_ends = sorted({*end_ids} - control)
        ends = {*end_ids} & control
        self._probe_response(tokenizer, control, ends)
        eos = tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id, *ends} | ({eos} - {None}))
        around = self.response_prefix + self.response_suffix
        self._control = ControlTokens(tokenizer, template.source, self.stop_ids, around)

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Return why a conversation cannot be encoded faithfully (its text contains a control token), or None."""
        for message in messages:
            for text in _texts_of(message):
                if token := self._control.found_in(text, message["role"] == "assistant"):
                    return _control_reason(token, message["role"])
        return None

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the template renders the text of a system turn: some raise, some silently omit it."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hi"}]
        try:
            return _PROBE in self.template.render(messages, add_generation_prompt=True)
        except InputError:
            return False

    def _prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the turns as the template gets them: system policy applied, soft control tokens in text marked."""
        turns: list[Any] = list(messages)
        if messages[0]["role"] == "system":
            if self.system == "fold":
                turns = fold_system(messages)
            elif not self._has_system_role:
                raise InputError(
                    f"the chat template of {self.name} has no system role but the data has system turns: "
                    "pass --system fold to move their text into the first user turn"
                )
        if reason := self.refusal(messages):
            raise RowRefused(reason)
        marked = (
            turn
            if turn["role"] == "assistant"
            else {**turn, **{key: self._control.marked(turn.get(key) or "") for key in turn.keys() & _MARKED}}
            for turn in turns
        )
        return list(marked)

    def _render(
        self, turns: list[dict[str, Any]], add_generation_prompt: bool, tools: str | None, row_arguments: str | None
    ) -> str:
        """Return prepared turns as text."""
        arguments, source = self._row_arguments(row_arguments), self.template.source
        # Marked as JSON text, so that every text inside is.
        called = json.loads(self._control.marked(_plain_json(tools, "tools"))) if tools else None
        read = [template_turn(turn, source) for turn in turns]
        if not any("tool_calls" in turn for turn in read):
            return self.template.render(read, add_generation_prompt, called or None, arguments)
        as_text = [template_turn(turn, source, arguments_as_text=True) for turn in turns]
        try:
            text = self.template.render(read, add_generation_prompt, called or None, arguments)
        except InputError:
            return self.template.render(as_text, add_generation_prompt, called or None, arguments)
        # An object that is written as it is becomes Python's notation, which is not JSON.
        if any(str(value) in text for value in _arguments_of(read)):
            return self.template.render(as_text, add_generation_prompt, called or None, arguments)
        return text

    def _row_arguments(self, text: str | None) -> Mapping[str, Any]:
        """Return the template arguments of one row, checked."""
        if not text:
            return {}
        arguments = json_value(text, "chat_template_kwargs")
        if not isinstance(arguments, Mapping):
            raise InputError("chat_template_kwargs of the row is not a mapping: correct the row")
        self.template.check_arguments(arguments)
        plain = _plain_json(text, "chat_template_kwargs")
        if token := self._control.found_in(plain, is_response=False):
            raise RowRefused(
                f"chat_template_kwargs contain the control token '{token}' as text: remove it from the row"
            )
        marked: dict[str, Any] = json.loads(self._control.marked(plain))
        return marked

    def thought_with(self, row_arguments: str | None) -> OpenedThought | None:
        """Return the thought that the generation prompt opens with the arguments of a row."""
        if not row_arguments:
            return self.thought
        if row_arguments not in self._thoughts:
            turns = [{"role": "user", "content": "Hi"}]
            self._thoughts[row_arguments] = opened_thought(self._render(turns, True, None, row_arguments))
        return self._thoughts[row_arguments]

    def prompt(self, prompt: Sequence[Message], tools: str | None, row_arguments: str | None) -> str:
        """Return the text of a prompt with the generation prompt.

        Raises:
            InputError: it ends with the assistant, or the template rejects it.
            RowRefused: its text contains a control token, or the template omits its tools or the text of a turn.
        """
        if not prompt or prompt[-1]["role"] == "assistant":
            raise InputError("a prompt must end with a user turn: give the conversation without its final response")
        if tools and (token := self._control.found_in(_plain_json(tools, "tools"), is_response=False)):
            raise RowRefused(f"the tools contain the control token '{token}' as text: remove it from the row")
        turns = self._prepare(prompt)
        text = self._render(turns, True, tools, row_arguments)
        for number, turn in enumerate(turns):
            if turn["role"] in ("system", "user") and not _is_written(turn["content"], text):
                raise RowRefused(
                    f"the chat template of {self.name} omits the text of a {turn['role']} turn (turn {number}): shorten the "
                    "conversation, or correct the template"
                )
        for kind, name in _names_of(prompt, tools):
            if name not in text:
                raise RowRefused(
                    f"the chat template of {self.name} omits {kind}: remove the column, or use another model"
                )
        return text

    def prompt_and_response(
        self,
        conversation: Sequence[Message],
        tools: str | None,
        row_arguments: str | None,
        prompt: str | None = None,
    ) -> tuple[str, str]:
        """Return the text of the prompt with the generation prompt, and that of the last turn as it continues it.

        ``prompt`` is :meth:`prompt` of the preceding conversation, if the caller already has it.

        Raises:
            RowRefused: they cannot be made to add up.
        """
        turn = conversation[-1]
        prompt = self.prompt(conversation[:-1], tools, row_arguments) if prompt is None else prompt
        whole = self._render(self._prepare(conversation), False, tools, row_arguments)
        response = self._continuation(prompt, whole, turn)
        if response is None:
            raise RowRefused(
                f"the chat template of {self.name} writes the prompt differently once this response follows (a thought that "
                "is not closed, or one that the prompt excludes): correct the row, or set chat_template_kwargs"
            )
        return prompt, self._complete(turn, prompt, response)

    def _continuation(self, prompt: str, whole: str, turn: Message) -> str | None:
        """Return what a turn adds to the text of its prompt, given the ``whole`` rendered text; None if they do not add up."""
        thought = opened_thought(prompt)
        if whole.startswith(prompt):
            response = whole[len(prompt) :]
            complete = (thought.opener if thought else "") + response
            first = leading_thought(complete)
            own = complete[len(first) :]
            # The template writes an empty thought before one that it does not recognise in the content.
            if is_empty_thought(first) and leading_thought(own):
                return thought.without_tag(own) if thought else own
            return None if thought and thought.close not in response else response
        if thought is None or not whole.startswith(header := prompt.removesuffix(thought.opener)):
            return None
        return thought.continued(whole[len(header) :], turn.get("content") or "", turn.get("reasoning_content"))

    def _complete(self, turn: Message, prompt: str, response: str) -> str:
        """Return the text of the last turn with the thought that the template cuts off; everything else must be in it.

        Raises:
            RowRefused: the template omits a part of the turn.
        """
        content = turn.get("content") or ""
        thought = leading_thought(content)
        is_in_prompt = is_empty_thought(thought) and ends_with_thought(prompt)
        if thought and not is_in_prompt and not has_thought(response, thought):
            response = thought.rstrip() + (response if response[:1].isspace() else _tail_space(thought) + response)
        text = behind_thought(content)
        is_cut = len(text) < len(content) and bare_text(content) not in bare_text(response)
        parts = [("text", text), ("reasoning_content", turn.get("reasoning_content") or ""), *_names_of([turn], None)]
        for kind, part in parts:
            if is_cut or part.strip() not in response:
                raise RowRefused(
                    f"the chat template of {self.name} omits the assistant's {kind}: correct the row or the template"
                )
        return response

    def _probe_response(self, tokenizer: Any, control: set[int], ends: set[int]) -> None:
        """Find out what the template writes before a response, after one, and which id ends it."""
        user = [{"role": "user", "content": "Hi"}]
        prompt = self.template.render(user, add_generation_prompt=True)
        whole = self.template.render([*user, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        _, found, after = whole.rpartition(_PROBE)
        if not found:
            raise InputError(f"the chat template of {self.name} omits the assistant's text: fix the template")
        self.thought = opened_thought(prompt)
        self.response_prefix = ""
        response = self._continuation(prompt, whole, {"role": "assistant", "content": _PROBE}) or ""
        self.response_prefix = response.rpartition(_PROBE)[0]
        ids = ids_of_pieces(tokenizer, after.strip()) if after.strip() else []
        end_id = end_of_turn_id(ids, control, ends, tokenizer.eos_token_id)
        if end_id is None:
            raise InputError(
                f"the tokenizer of {self.name} has neither an EOS token nor an end-of-turn token in its template, "
                "so a response could never end: set eos_token in tokenizer_config.json"
            )
        self.end_id = int(end_id)
        end_text = str(tokenizer.convert_ids_to_tokens(self.end_id))
        self.response_suffix = after.partition(end_text)[0] if end_text in after and ids[0] != self.end_id else ""
        self.response_suffix = self.response_suffix if ids and ids[0] in control else ""


def _is_written(content: str, text: str) -> bool:
    """Return whether a template wrote the content of a turn, however it treats whitespace."""
    return content.strip() in text or bare_text(content) in bare_text(text)


def _control_reason(token: str, role: str) -> str:
    return f"the {role} turn contains the control token '{token}' as text: remove it from the row"


def _texts_of(message: Message) -> list[str]:
    """Every text of a turn that a template may write."""
    keys = ("content", "reasoning_content", "tool_calls", "name", "tool_call_id")
    found = {key: str(message[key]) for key in keys if message.get(key) is not None}
    if "tool_calls" in found:
        found["tool_calls"] = _plain_json(message["tool_calls"], "tool_calls")
    return list(found.values())


def _plain_json(value: Any, where: str) -> str:
    """Return JSON text without escapes, which would hide a control token."""
    return json.dumps(json_value(value, where), ensure_ascii=False)


def _names_of(messages: Sequence[Message], tools: str | None) -> list[tuple[str, str]]:
    """Return what a template must write of tools and tool calls, as (kind, name of the function)."""
    named = [("tools", json_value(tools, "tools"))] if tools else []
    named += [
        ("tool_calls", json_value(turn["tool_calls"], "tool_calls")) for turn in messages if turn.get("tool_calls")
    ]
    found = []
    for kind, items in named:
        for item in items if isinstance(items, list) else []:
            function = item.get("function", item) if isinstance(item, Mapping) else {}
            if isinstance(function, Mapping) and function.get("name"):
                found.append((kind, str(function["name"])))
    return found


def _arguments_of(turns: list[dict[str, Any]]) -> list[Any]:
    """The arguments of the tool calls in prepared turns that are not empty."""
    calls = [call for turn in turns for call in turn.get("tool_calls", ()) if isinstance(call, Mapping)]
    functions = [call.get("function", call) for call in calls]
    return [function["arguments"] for function in functions if function.get("arguments")]


def _tail_space(text: str) -> str:
    return text[len(text.rstrip()) :]
