"""Thoughts in responses: templates that open one in the generation prompt, and the answer behind a thought."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"((?:seed:)?(?:think|thinking|thought|reasoning))"
# The marker that opens a thought -> the one that closes it.
_PAIRS = (
    (re.compile(rf"<{_NAME}>\Z", re.IGNORECASE), r"</\1>"),
    (re.compile(rf"\[{_NAME}\]\Z", re.IGNORECASE), r"[/\1]"),
    (re.compile(r"<\|START_THINKING\|>\Z"), "<|END_THINKING|>"),
    (re.compile(rf"<\|(channel)>{_NAME}\Z"), r"<\1|>"),
)
_WHOLE = re.compile(
    r"\s*(?:<(?P<tag>think|thinking|thought|reasoning|seed:think)>.*?</(?P=tag)>|\[THINK\].*?\[/THINK\]"
    r"|<\|START_THINKING\|>.*?<\|END_THINKING\|>|<\|channel>thought.*?<channel\|>)\s*",
    re.DOTALL,
)
_OPENING = re.compile(
    r"<(?:seed:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought"
)
_CLOSING = re.compile(r"</(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>")
_HARMONY_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True)
class OpenedThought:
    """A thought that the generation prompt opens: the text that opens it (with the space behind it) and what closes it."""

    opener: str
    close: str

    @property
    def tag(self) -> str:
        return self.opener.strip()

    @property
    def closing(self) -> str:
        """What closes a thought before the answer, with the space that such templates write around it."""
        return f"\n{self.close}\n\n" if "\n" in self.opener else self.close

    def continued(self, rendered: str, content: str, reasoning: str | None) -> str | None:
        """Return what follows the opened thought in a turn; None if the turn's own thought never ends, or follows other text.

        Args:
            rendered: the turn as the template writes it after the header, without the opened thought.
            content: the text of the turn.
            reasoning: its ``reasoning_content``, if it has one.
        """
        body = rendered.lstrip()
        if body.startswith(self.tag):
            body = self.without_tag(body)
            return body if self.close in body else None
        if reasoning:
            return reasoning.strip("\n") + self.closing + body
        if self.close in content and self.close not in rendered:  # the template cuts thoughts
            thought = content[: content.rindex(self.close) + len(self.close)].lstrip()
            if self.tag in thought.removeprefix(self.tag).partition(self.close)[0]:
                return None
            gap = "" if rendered[:1].isspace() else content[content.rindex(self.close) + len(self.close) :]
            gap = gap[: len(gap) - len(gap.lstrip())]
            return (self.without_tag(thought) if thought.startswith(self.tag) else thought) + gap + rendered
        before, close, _ = rendered.partition(self.close)
        if close and self.tag not in before:  # the continuation of the opened thought, as a model samples it
            return rendered
        return None if self.tag in content else self.closing + body

    def without_tag(self, text: str) -> str:
        """Return a text that starts with the opening marker without it."""
        text = text[len(self.tag) :]
        space = self.opener[len(self.tag) :] if self.opener.startswith(self.tag) else ""
        return text.removeprefix(space)


def opened_thought(generation_prompt: str) -> OpenedThought | None:
    """Return the thought that a generation prompt ends with, if it opens one."""
    text = generation_prompt.rstrip()
    for opening, closing in _PAIRS:
        if found := opening.search(text):
            return OpenedThought(generation_prompt[found.start() :], found.expand(closing))
    return None


def leading_thought(text: str) -> str:
    """Return the complete thought that a response starts with, with the space around it, or an empty text."""
    found = _WHOLE.match(text)
    return found[0] if found else ""


def is_empty_thought(text: str) -> bool:
    """Return whether a text is a thought without content."""
    return bool(text.strip()) and not _CLOSING.sub("", _OPENING.sub("", text)).strip()


def bare_text(text: str) -> str:
    """Return a text without the markers of thoughts and without whitespace, which templates change."""
    return "".join(_CLOSING.sub("", _OPENING.sub("", text)).split())


def has_thought(response: str, thought: str) -> bool:
    """Return whether a response contains a complete thought, however it is spaced."""
    return _CLOSING.search(response) is not None and bare_text(thought) in bare_text(response)


def ends_with_thought(prompt: str) -> bool:
    """Return whether a prompt ends with a thought that is closed, as that of a model that is not to think."""
    return max((found.end() for found in _CLOSING.finditer(prompt)), default=0) == len(prompt.rstrip()) > 0


def behind_thought(text: str) -> str:
    """Return what stands behind the last marker that closes a thought; the whole text if there is none."""
    return text[max((found.end() for found in _CLOSING.finditer(text)), default=0) :]


def without_thought(response: str) -> str:
    """Return a response without its thought: the text behind it, or the final channel of a response in channels.

    The thought may lack its opening marker, since many templates write that into the prompt. A response that was truncated
    inside its thought has no answer: the empty text.
    """
    if _HARMONY_FINAL in response:
        return response.rpartition(_HARMONY_FINAL)[2]
    if thought := leading_thought(response):
        return response[len(thought) :]
    first = _CLOSING.search(response)
    if first is None:
        return "" if _OPENING.match(response.lstrip()) else response
    return response if _OPENING.search(response, 0, first.start()) else response[first.end() :].lstrip()
