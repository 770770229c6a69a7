"""``report.html``: one self-contained page, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from spin.alignment.report.table import CAPTION, LINEAGE_HEADINGS, cells

_CSS = """
:root { color-scheme: light dark; --ink: #1f2937; --quiet: #6b7280; --paper: #ffffff; --panel: #f6f7f9; --line: #e2e5ea;
  --good: #15803d; --bad: #b91c1c; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --quiet: #9ca3af; --paper: #14171c; --panel: #1d2128;
  --line: #323843; --good: #4ade80; --bad: #f87171; --warn: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p.quiet, figcaption { color: var(--quiet); font-size: .87rem; margin: .4rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--panel); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td { white-space: normal; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
.better { color: var(--good); } .worse { color: var(--bad); } .warning { color: var(--warn); }
figure { margin: 0; } img { width: 100%; border-radius: 8px; border: 1px solid var(--line); }
.sample { background: var(--panel); border-radius: 8px; padding: .8rem 1rem; margin: .7rem 0; }
.sample dt { color: var(--quiet); font-size: .82rem; margin-top: .5rem; }
.sample dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .88rem; }
"""


def render_page(
    name: str,
    summary: dict[str, Any],
    samples: Sequence[dict[str, Any]],
    lineage: Sequence[Sequence[str]],
    image: bytes,
) -> str:
    """Return the page of a run; ``image`` is a PNG."""
    headings, rows = cells(summary)
    first = summary["rows"][0]
    scored = f"{first['metric']} on {first['n']} held-out prompts" if "metric" in first else "not scored"
    encoded = base64.b64encode(image).decode()
    sections = [
        f"<h1>Self-play run {html.escape(name)}</h1>",
        f'<p class="quiet">{html.escape(scored)}; bars and verdicts: two standard errors</p>',
        "<h2>Results</h2>",
        _table(headings, rows),
        f'<p class="quiet">{html.escape(CAPTION)}</p>',
        f'<h2>Course</h2><figure><img alt="Measures by iteration" src="data:image/png;base64,{encoded}"></figure>',
        _items("Verdict", summary["verdicts"]),
        _items("Warnings", summary["warnings"], "warning"),
        "<h2>Lineage</h2>",
        _table(LINEAGE_HEADINGS, lineage, "text"),
        "<h2>Before and after</h2>" if samples else "",
        *map(_sample, samples),
    ]
    title = html.escape(f"SPIN: {name}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _items(title: str, lines: Sequence[str], kind: str = "") -> str:
    if not lines:
        return ""
    items = "".join(f'<li class="{kind or _kind(line)}">{html.escape(line)}</li>' for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>"


def _kind(verdict: str) -> str:
    return next((word for word in ("better", "worse") if verdict.endswith(f"({word})")), "")


def _sample(sample: dict[str, Any]) -> str:
    pairs = {"prompt": sample["prompt"], "ground truth": sample["truth"], **sample["responses"]}
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs.items())
    return f'<dl class="sample">{items}</dl>'
