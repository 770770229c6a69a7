"""A server that judges: it prefers the longer of two responses, or says what a test tells it to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.fake_openai_server import FakeServer


def reply(text: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two responses in a question."""
    content = body["messages"][0]["content"]
    first, second = (
        re.search(rf"\[Response {name}\]\n(.*)\n\[End of response {name}\]", content, re.DOTALL) for name in "AB"
    )
    assert first and second
    return first[1], second[1]


def longer_wins(body: dict[str, Any]) -> str:
    first, second = (len(text) for text in shown(body))
    return "tie" if first == second else "I think so.\n[[A]]" if first > second else "**[[B]]**"


@contextmanager
def judging_server() -> Iterator[FakeServer]:
    """A server whose ``say(body)`` is the reply to a question; at first :func:`longer_wins`."""
    fake = FakeServer()
    fake.say = longer_wins
    fake.behave = lambda handler, body: handler.say(200, reply(fake.say(body)))
    try:
        yield fake
    finally:
        fake.close()
