"""Rendering conversations as text with a tokenizer's chat template: its arguments, its date, and limits of time and size."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.core.time_limit import TimeLimitReached, time_limit

MAX_SECONDS = 20.0
MAX_CHARACTERS = 20_000_000
# What the template receives besides its arguments.
_OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_DATE_FUNCTION = "strftime_now"


class ChatTemplate:
    """A tokenizer's chat template with the arguments that it is always rendered with.

    ``arguments`` are template arguments such as ``enable_thinking``. ``date`` is what a template with today's date sees, so that
    the same conversation gives the same text on any day. ``source`` is the text of the template, or of all of them.
    """

    def __init__(self, tokenizer: Any, name: str, arguments: Mapping[str, Any], date: datetime.date) -> None:
        """``name`` is the model's, for messages.

        Raises:
            InputError: there is no template, or it does not use one of the arguments.
        """
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {name} has no chat template: add chat_template.jinja to its folder "
                "or start from a chat (SFT) model"
            )
        if not isinstance(tokenizer.chat_template, str | dict):
            raise InputError(
                f"the chat template of {name} is {type(tokenizer.chat_template).__name__}, not text: restore its tokenizer files"
            )
        self.tokenizer, self.name, self.date = tokenizer, name, date
        self.arguments = dict(arguments)
        template = tokenizer.chat_template
        # Some tokenizers have several templates by name.
        self.source = template if isinstance(template, str) else "\n".join(template.values())
        self.hashed = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        self.uses_date = _DATE_FUNCTION in self.source
        self.check_arguments(self.arguments)

    def mentions(self, name: str) -> bool:
        """Return whether a name occurs in the template."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def check_arguments(self, names: Iterable[str]) -> None:
        """Check that the template uses each of these arguments, since any other would be ignored.

        Raises:
            InputError: it does not; the closest variable of the template is suggested.
        """
        for name in names:
            if name in _OWN_NAMES:
                raise InputError(f"chat_template_kwargs contains '{name}', which is set for every row: remove it")
            # A tokenizer with rendering code of its own may take arguments that its template does not mention.
            if not self.mentions(name) and not _renders_itself(self.tokenizer):
                raise InputError(
                    f"chat_template_kwargs contains '{name}', which the chat template of {self.name} does not use: remove or "
                    f"correct it{suggestion(name, _variables(self.source))}"
                )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as text; ``arguments`` are those of one row, on top of the template's own.

        Raises:
            InputError: the template rejects the conversation, runs too long or writes too much.
        """
        values = {**self.arguments, **(arguments or {}), _DATE_FUNCTION: self._strftime}
        try:
            with time_limit(MAX_SECONDS):
                return self._rendered(list(messages), add_generation_prompt, tools, values)
        except InputError:
            raise
        except TimeLimitReached:
            raise InputError(
                f"the chat template of {self.name} was still running after {MAX_SECONDS:g} s: fix the template"
            ) from None
        except Exception as error:  # a template may raise anything, and its message is what the user needs
            roles = ", ".join(str(message["role"]) for message in messages)
            raise InputError(
                f"the chat template of {self.name} rejects the turns '{roles}' ({error}): fix the row or the template"
            ) from error

    def _rendered(
        self, messages: list[Any], add_generation_prompt: bool, tools: list[Any] | None, values: dict[str, Any]
    ) -> str:
        if _renders_itself(self.tokenizer):
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **values
            )
            return self._checked_size(str(text))
        template = _compiled(self.tokenizer.get_chat_template(None, tools))
        given = {"messages": messages, "tools": tools, "documents": None}
        pieces: list[str] = []
        written = 0
        # Piece by piece, so that a template without an end is stopped by what it writes before it fills the memory.
        for piece in template.generate(
            **{**self.tokenizer.special_tokens_map, **values, **given, "add_generation_prompt": add_generation_prompt}
        ):
            written += len(piece)
            if written > MAX_CHARACTERS:
                break
            pieces.append(piece)
        return self._checked_size("".join(pieces), written)

    def _checked_size(self, text: str, written: int = 0) -> str:
        if max(len(text), written) > MAX_CHARACTERS:
            raise InputError(
                f"the chat template of {self.name} writes more than {MAX_CHARACTERS:,} characters for one conversation: fix "
                "the template"
            )
        return text

    def _strftime(self, form: str) -> str:
        return datetime.datetime.combine(self.date, datetime.time()).strftime(form)


def template_turn(turn: Mapping[str, Any], template: str, arguments_as_text: bool = False) -> dict[str, Any]:
    """Return a turn as a ``template`` reads it: without keys that are null, tool calls (JSON text) as objects, the reasoning also
    under the name that the template knows it by.

    ``arguments_as_text``: the arguments of tool calls stay JSON text, which some templates expect.

    Raises:
        InputError: ``tool_calls`` is not a JSON list.
    """
    read = {key: value for key, value in turn.items() if value is not None}
    if "tool_calls" in read:
        calls = json_value(read["tool_calls"], "tool_calls")
        if not isinstance(calls, list):
            raise InputError("tool_calls is not a list: correct the row")
        read["tool_calls"] = [_with_arguments(call, arguments_as_text) for call in calls]
    if read.get("reasoning_content") and "reasoning_content" not in template:
        read |= {name: read["reasoning_content"] for name in ("thinking", "reasoning") if _reads_key(name, template)}
    return read


def _reads_key(name: str, template: str) -> bool:
    return re.search(rf"[.'\"]{name}\b", template) is not None


def json_value(value: Any, where: str) -> Any:
    """Return a JSON text as an object; an object is returned as it is.

    Raises:
        InputError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}): correct the row") from error


def _with_arguments(call: Any, as_text: bool) -> Any:
    """Return a tool call with its arguments as an object, or as JSON text: APIs store text, most templates expect an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text:
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    return {**call, "function": {**function, "arguments": arguments}}


def _renders_itself(tokenizer: Any) -> bool:
    """Return whether a tokenizer's class has rendering code of its own in place of the library's."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is not PreTrainedTokenizerBase.apply_chat_template


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=64)
def _variables(source: str) -> list[str]:
    from jinja2 import TemplateError, meta

    try:
        return sorted(meta.find_undeclared_variables(_environment().parse(source)) - {*_OWN_NAMES})
    except TemplateError:
        return []


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    """Return the environment of chat templates as transformers defines it, with limits on the size of a single operation."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks the assistant's text; it renders its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        # `x * 10**9` is a single operation, which no time limit can interrupt.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = [value for value in (left, right) if isinstance(value, int | float)]
            texts = [value for value in (left, right) if isinstance(value, str | list | tuple)]
            product = len(texts[0]) * numbers[0] if texts and numbers else 0
            if product > MAX_CHARACTERS or (operator == "**" and max(map(abs, numbers), default=0) > 10_000):
                raise InputError(f"a chat template computes '{operator}' of a huge value: fix the template")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own filter escapes HTML, which a model must not see.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    # What they write differs from one rendering to the next: a model would be trained on another prompt than it answered.
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals["raise_exception"] = raise_exception
    environment.globals[_DATE_FUNCTION] = None  # every rendering passes its own
    return environment
