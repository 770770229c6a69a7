"""The table of what sampling ahead gains, from a result of ``benchmarks/async_online.py``. Called by scripts/make_docs.py."""

from __future__ import annotations

from benchmarks.result_tables import RESULTS, markdown_table
from spin.alignment.core.files import read_json

PARTS = {"sampling, waiting and sending": "generate", "reference": "reference", "update": "update"}


def async_table(name: str) -> str:
    """Return the seconds of a step and of its parts with ``async_steps`` 0 and 1, and how much shorter steps become."""
    result = read_json(RESULTS / f"{name}.json")
    lines = []
    for steps, contender in enumerate(("sync", "async")):
        found = result["contenders"][contender]
        parts = [f"{found[part]:.2f}" for part in PARTS.values()]
        lines.append([f"`async_steps: {steps}`", f"{found['step']:.2f}", *parts, f"{found['staleness']:.0f}"])
    low, high = result["ratio_spread"]
    settings, turns = result["settings"], len(result["contenders"]["sync"]["turns"])
    caption = (
        f"Medians of {turns} turns in seconds; {settings['prompts']} prompts a step, {settings['samples']} responses of at most "
        f"{settings['max_new_tokens']} tokens; {result['machine']['cpu']}, one core for the server and one for the training. "
        f"Steps are **{result['ratio']:.2f} times** shorter ({low:.2f} to {high:.2f}); with perfect overlap they would be "
        f"{result['limit']:.2f} times."
    )
    headings = ["", "a step", *PARTS, "staleness"]
    return f"{markdown_table(headings, lines)}\n\n{caption}"
