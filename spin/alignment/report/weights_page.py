"""The page of token weights: a few pairs, every token on a background that says how much it counts. Self-contained."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.files import write_text_atomic
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.sides import SIDES

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

_CSS = """
:root { color-scheme: light dark; --ink: #1f2937; --quiet: #6b7280; --paper: #ffffff; --panel: #f6f7f9; --line: #e2e5ea;
  --more: 234, 88, 12; --less: 37, 99, 235; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --quiet: #9ca3af; --paper: #14171c; --panel: #1d2128;
  --line: #323843; --more: 251, 146, 60; --less: 96, 165, 250; } }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } p.quiet { color: var(--quiet); font-size: .87rem; margin: .3rem 0; }
.pair { background: var(--panel); border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0; }
.pair dt { color: var(--quiet); font-size: .82rem; margin-top: .6rem; }
.pair dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .92rem/1.9 ui-monospace, monospace; }
.t { border-radius: 3px; padding: .12em 0; border-right: 1px solid var(--line); }
.end { font-size: .78em; color: var(--quiet); } .none { text-decoration: underline dotted; color: var(--quiet); }
.minus { text-decoration: line-through; }
.legend { display: flex; gap: .4rem; flex-wrap: wrap; margin: .8rem 0; font: .85rem/1.9 ui-monospace, monospace; }
.legend .t { padding: .12em .5em; border: 1px solid var(--line); }
"""
_BREAKS = {"\n": "⏎\n", "\t": "⇥\t"}


@dataclass(frozen=True)
class Token:
    """What is shown of one token: its text (empty where several tokens make one character), its name, and its weight."""

    text: str
    name: str
    weight: float


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

    def style(self, weight: float) -> str:
        """Return the background of a weight."""
        above = weight > self.middle
        room = (self.high if above else self.low) - self.middle
        strength = (weight - self.middle) / room if room else 0.0
        return f"background: rgba(var(--{'more' if above else 'less'}), {0.75 * strength:.2f})"


def write_weights_page(
    path: Path, weights_dir: Path, encoder: ChatEncoder, facts: Sequence[str], count: int = 8
) -> None:
    """Write the page of the first ``count`` weighed pairs in a folder."""
    pairs = list(islice(_weighed_rows(weights_dir), count))
    shown = [
        (
            "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["chosen"][:-1]),
            {side: tokens_of(row[f"{side}_token_ids"], row[f"{side}_weights"], encoder) for side in SIDES},
        )
        for row in pairs
    ]
    write_text_atomic(path, render_weights_page(shown, facts))


def _weighed_rows(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("*_prefs*.parquet"), key=lambda file: (file.name.startswith("test"), file.name)):
        for row in read_rows(file, batch_size=64):
            if row["chosen_weights"] is not None:
                yield row


def tokens_of(ids: Sequence[int], weights: Sequence[float], encoder: ChatEncoder) -> list[Token]:
    """Return the tokens of a response with the text that each stands for."""
    from spin.alignment.token_weights.model_scores import student_text

    text, spans = student_text(encoder, ids)
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return [
        Token(text[start:end], str(name), weight)
        for (start, end), name, weight in zip(spans, names, weights, strict=True)
    ]


def render_weights_page(pairs: Sequence[tuple[str, dict[str, list[Token]]]], facts: Sequence[str]) -> str:
    """Return the page of some pairs: each a prompt and the tokens of both responses."""
    scale = Scale.of([token.weight for _, sides in pairs for tokens in sides.values() for token in tokens])
    marks = dict.fromkeys(
        (scale.low, (scale.low + scale.middle) / 2, scale.middle, (scale.middle + scale.high) / 2, scale.high)
    )
    legend = "".join(f'<span class="t" style="{scale.style(mark)}">{mark:.3g}</span>' for mark in marks)
    sections = [
        "<h1>Token weights</h1>",
        *(f'<p class="quiet">{html.escape(line)}</p>' for line in facts),
        f'<div class="legend"><span>weight:</span>{legend}</div>',
        '<p class="quiet">Blue counts less than the mean of this page, orange more; hover a token for its weight. Struck '
        "through: below 0. Dotted: not scored (beyond max_length). Small: tokens without text of their own, such as the end of "
        "the turn.</p>",
        *(_pair(prompt, sides, scale) for prompt, sides in pairs),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Token weights</title>'
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _pair(prompt: str, sides: dict[str, list[Token]], scale: Scale) -> str:
    items = f"<dt>prompt</dt><dd>{html.escape(prompt)}</dd>"
    for side, tokens in sides.items():
        items += f"<dt>{side}</dt><dd>{''.join(_token(token, scale) for token in tokens)}</dd>"
    return f'<dl class="pair">{items}</dl>'


def _token(token: Token, scale: Scale) -> str:
    known = not math.isnan(token.weight)
    kinds = ["t", "" if token.text else "end", "" if known else "none", "minus" if token.weight < 0 else ""]
    shown = "".join(_BREAKS.get(letter, letter) for letter in token.text) or token.name
    title = f"{token.name}: {token.weight:.3f}" if known else f"{token.name}: not scored"
    style = f' style="{scale.style(token.weight)}"' if known else ""
    kind = " ".join(filter(None, kinds))
    return f'<span class="{kind}"{style} title="{html.escape(title)}">{html.escape(shown)}</span>'
