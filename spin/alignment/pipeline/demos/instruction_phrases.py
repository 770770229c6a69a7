"""How the chat demo words its instructions: several phrasings for each kind, and the arguments that are drawn for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Phrases:
    """The wordings of one kind of instruction.

    Attributes:
        texts: sentences; ``{count}`` and the like are arguments, a list is joined by commas.
        arguments: the choices for each argument. A count of one is avoided, so that plurals are right.
        theme: kinds of one theme are not asked for together, since they may contradict each other.
        genres: the genres of tasks that it suits; empty: all.
    """

    texts: Sequence[str]
    arguments: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    theme: str = ""
    genres: Sequence[str] = ()


# Training on pairs of the model's own responses can only strengthen what the model sometimes does: these are the kinds that
# SmolLM2-135M-Instruct follows in some responses, and not in most. It never wrote in capital letters, in quotation marks or
# with a given ending, and hardly ever used digits.
TRAINED: dict[str, Phrases] = {
    "no_commas": Phrases(
        ("Do not use any commas.", "Avoid commas in your whole answer.", "Your answer must not contain a comma."),
        theme="marks",
    ),
    "at_most_words": Phrases(
        ("Use at most {count} words.", "Answer in no more than {count} words.", "Keep it to {count} words or fewer."),
        {"count": (12, 15, 20, 25, 30)},
        theme="length",
    ),
    "at_least_words": Phrases(
        (
            "Use at least {count} words.",
            "Write no fewer than {count} words.",
            "Your answer needs {count} words or more.",
        ),
        {"count": (20, 25, 30, 40)},
        theme="length",
    ),
    "sentences": Phrases(
        (
            "Answer in exactly {count} sentences.",
            "Write exactly {count} sentences.",
            "Use {count} sentences, no more and no fewer.",
        ),
        {"count": (2, 3)},
        theme="length",
    ),
    "numbered_list": Phrases(
        (
            "Answer with a numbered list of {count} items.",
            "Write a list numbered from 1 to {count}.",
            "Number your {count} points 1, 2 and so on.",
        ),
        {"count": (2, 3)},
        theme="form",
    ),
    "includes": Phrases(
        (
            'Use the word "{word}" in your answer.',
            'Your answer must contain the word "{word}".',
            'Mention the word "{word}".',
        ),
        {
            "word": (
                "surprise",
                "patience",
                "window",
                "silver",
                "together",
                "morning",
                "simple",
                "careful",
                "market",
                "blue",
                "garden",
                "music",
                "journey",
                "winter",
                "honest",
                "bridge",
                "lucky",
                "gentle",
                "famous",
                "hidden",
            )
        },
        theme="words",
    ),
    "excludes": Phrases(
        (
            "Do not use these words: {words}.",
            "Avoid the words {words}.",
            "Your answer must not contain any of the words {words}.",
        ),
        {
            "words": (
                ["you", "your"],
                ["can", "will"],
                ["that", "this"],
                ["it", "its"],
                ["very", "also"],
                ["for", "with"],
            )
        },
        theme="words",
    ),
}

HELD_OUT: dict[str, Phrases] = {
    "starts_with": Phrases(
        ('Begin your answer with exactly these words: "{text}"', 'The first words of your answer must be "{text}"'),
        {"text": ("In short,", "My friend,", "Let me think:", "To be honest,", "Good question!")},
    ),
    "every_line_starts_with": Phrases(
        (
            'Write two or more lines, and start every line with "{text}".',
            'Use several lines that all begin with "{text}".',
        ),
        {"text": (">", "+", "=>")},
    ),
    "lines": Phrases(
        ("Answer in exactly {count} lines.", "Write exactly {count} lines of text."), {"count": (2, 3, 4)}
    ),
    "paragraphs": Phrases(
        (
            "Write exactly {count} paragraphs with an empty line between them.",
            "Use {count} paragraphs separated by a blank line.",
        ),
        {"count": (2, 3)},
    ),
    "bold": Phrases(
        (
            "Put at least {count} words in bold, like **this**.",
            "Highlight {count} or more parts of your answer as **bold** text.",
        ),
        {"count": (2, 3)},
    ),
    "ends_with_question": Phrases(
        ("End your answer with a question.", "The last sentence of your answer must be a question."),
    ),
    "json_object": Phrases(
        (
            "Answer with a JSON object that has exactly the keys {keys}, and nothing else.",
            "Return only JSON: one object with the keys {keys}.",
        ),
        {"keys": (["title", "text"], ["answer", "reason"], ["summary", "mood"])},
    ),
    "answer_option": Phrases(
        (
            "Answer with exactly one of these options: {options}.",
            "Reply with one of the following and nothing else: {options}.",
        ),
        {"options": (["Yes", "No", "It depends"], ["Agree", "Disagree", "Not sure"])},
        genres=("opinion",),
    ),
}

# Pairs of themes, or of kinds, that contradict each other or make the wording ambiguous.
CONFLICTS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in (
        ("sentences", "form"),
        ("at_most_words", "form"),
        ("excludes", "form"),
    )
)


def go_together(one: str, other: str) -> bool:
    """Return whether two trained kinds can be asked for in one prompt."""
    names = [{kind, TRAINED[kind].theme} for kind in (one, other)]
    if TRAINED[one].theme == TRAINED[other].theme:
        return False
    return not any(frozenset((a, b)) in CONFLICTS for a in names[0] for b in names[1])
