"""``report.html``: one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from spin.alignment.report.render import render
from spin.alignment.report.table import CAPTION, LINEAGE_HEADINGS, cells


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
    return render(
        "report",
        name=name,
        scored=scored,
        headings=headings,
        rows=rows,
        caption=CAPTION,
        image=base64.b64encode(image).decode(),
        verdicts=[(verdict, _kind(verdict)) for verdict in summary["verdicts"]],
        warnings=summary["warnings"],
        lineage_headings=LINEAGE_HEADINGS,
        lineage=lineage,
        samples=samples,
    )


def _kind(verdict: str) -> str:
    return next((word for word in ("better", "worse") if verdict.endswith(f"({word})")), "")
