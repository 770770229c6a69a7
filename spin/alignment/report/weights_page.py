"""The page of token weights: a few pairs, every token on a background that shows its weight. Self-contained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.files import write_text_atomic
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.sides import SIDES
from spin.alignment.report.render import render

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

_BREAKS = {"\n": "⏎\n", "\t": "⇥\t"}


@dataclass(frozen=True)
class Token:
    """One token on the page: its text (empty if several tokens form one character), its name, and its weight."""

    text: str
    name: str
    weight: float

    @property
    def is_scored(self) -> bool:
        """Whether the token has a weight: those beyond ``max_length`` have none (NaN)."""
        return not math.isnan(self.weight)

    @property
    def kind(self) -> str:
        """The CSS classes of the token."""
        marks = {"end": not self.text, "none": not self.is_scored, "minus": self.weight < 0}
        return " ".join(["t", *(mark for mark, applies in marks.items() if applies)])

    @property
    def shown(self) -> str:
        """The text with visible line breaks and tabs, or the token's name if it has no text."""
        return "".join(_BREAKS.get(letter, letter) for letter in self.text) or self.name

    @property
    def title(self) -> str:
        """The tooltip of the token."""
        return f"{self.name}: {self.weight:.3f}" if self.is_scored else f"{self.name}: not scored"


@dataclass(frozen=True)
class Scale:
    """Colours of weights: none at ``middle``, full at ``low`` (blue) and ``high`` (orange)."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, weights: Sequence[float]) -> Scale:
        """Return the scale of some weights: its middle is their mean."""
        known = [weight for weight in weights if not math.isnan(weight)] or [1.0]
        return cls(min(known), sum(known) / len(known), max(known))

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, dict[str, list[Token]]]]) -> Scale:
        """Return the scale of the tokens of some pairs."""
        return cls.of([token.weight for _, sides in pairs for tokens in sides.values() for token in tokens])

    def marks(self) -> list[float]:
        """Return the weights of the legend: the middle, both ends, and the points half way between."""
        low, middle, high = self.low, self.middle, self.high
        return list(dict.fromkeys((low, (low + middle) / 2, middle, (middle + high) / 2, high)))

    def style(self, weight: float) -> str:
        """Return the background of a weight."""
        above = weight > self.middle
        span = (self.high if above else self.low) - self.middle
        strength = (weight - self.middle) / span if span else 0.0
        return f"background: rgba(var(--{'more' if above else 'less'}), {0.75 * strength:.2f})"


def write_weights_page(
    path: Path, weights_dir: Path, encoder: ChatEncoder, facts: Sequence[str], count: int = 8
) -> None:
    """Write the page of the first ``count`` weighted pairs in a folder."""
    write_text_atomic(path, render_weights_page(shown_pairs(weights_dir, encoder, count), facts))


def shown_pairs(weights_dir: Path, encoder: ChatEncoder, count: int) -> list[tuple[str, dict[str, list[Token]]]]:
    """Return the first ``count`` weighted pairs in a folder: each a prompt and the tokens of both responses."""
    return [
        (
            "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["chosen"][:-1]),
            {side: tokens_of(row[f"{side}_token_ids"], row[f"{side}_weights"], encoder) for side in SIDES},
        )
        for row in islice(_weighted_rows(weights_dir), count)
    ]


def _weighted_rows(folder: Path) -> Iterator[dict]:
    # Training pairs first: held-out files sort to the end.
    for file in sorted(folder.glob("*_prefs*.parquet"), key=lambda file: (file.name.startswith("test"), file.name)):
        for row in read_rows(file, batch_size=64):
            if row["chosen_weights"] is not None:
                yield row


def tokens_of(ids: Sequence[int], weights: Sequence[float], encoder: ChatEncoder) -> list[Token]:
    """Return the tokens of a response with the text of each."""
    from spin.alignment.token_weights.model_scores import student_text

    text, spans = student_text(encoder, ids)
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return [
        Token(text[start:end], str(name), weight)
        for (start, end), name, weight in zip(spans, names, weights, strict=True)
    ]


def render_weights_page(pairs: Sequence[tuple[str, dict[str, list[Token]]]], facts: Sequence[str]) -> str:
    """Return the page of some pairs: each a prompt and the tokens of both responses."""
    return render("weights", pairs=pairs, facts=facts, scale=Scale.of_pairs(pairs))
