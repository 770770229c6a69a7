"""What the documentation tells readers to type: the code blocks of a page and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

FENCED = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n(?: {4,}.*\n)*)")
INLINE = re.compile(r"`([^`\n]+)`")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# How a command of the project, or one that installs it, begins.
STARTS = re.compile(r"(?:\w+=\S* )*(?:taskset \S+ \S+ )?(?:spin|selfplay-spin|python3?|accelerate|bash|pip) ")


@dataclass
class Command:
    """One command: its words, the environment variables that are set for it, and whether it stands there in full."""

    words: list[str]
    variables: list[str] = field(default_factory=list)
    complete: bool = True

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [match["code"] for match in FENCED.finditer(text) if match["language"] == language]


def inline_codes(text: str) -> list[str]:
    """Return the pieces of code in sentences and tables, in order."""
    return INLINE.findall(FENCED.sub("", COMMENT.sub("", text)).replace("\\|", "|"))


def commands_of(text: str) -> Iterator[Command]:
    """Yield the commands of a page: of its bash blocks, of indented lines and of code in sentences, placeholders included."""
    prose = FENCED.sub("", text)
    indented = [re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE) for match in INDENTED.finditer(prose)]
    sentences = [code for code in inline_codes(text) if STARTS.match(code) and " " in code]
    for script in [*blocks(text, "bash"), *(item for item in indented if STARTS.match(item))]:
        yield from _commands(script, complete=True)
    for code in sentences:
        yield from _commands(code, complete=False)


def _commands(script: str, complete: bool) -> Iterator[Command]:
    exported: list[str] = []
    for line in script.replace("\\\n", " ").splitlines():
        # A placeholder such as <this repository> is one word, and what [] encloses may be left out.
        line = re.sub(r"<[^<>]+>", "PLACE", line.replace("[--key=value ...]", "..."))
        line = re.sub(r"\[(--[^\]]*)\]", r"\1", re.sub(r"\$\(\(.*?\)\)", "1", line))
        for words in _split(shlex.split(line, comments=True)):
            variables = list(exported)
            while words and re.match(r"[A-Z_]+=", words[0]):
                variables.append(words.pop(0).partition("=")[0])
            if words[:1] == ["export"]:
                exported += [word.partition("=")[0] for word in words[1:]]
            elif words:
                yield Command(words, variables, complete)


def _split(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a line, which ``&&`` and ``|`` separate."""
    start = 0
    for index, word in enumerate([*words, "&&"]):
        if word in ("&&", "|"):
            yield words[start:index]
            start = index + 1
