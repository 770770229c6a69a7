"""Measures the page of a long run: its size, and how soon a browser shows it.

    python benchmarks/page.py --out benchmarks/results/page.json

The run is made up: a start and four iterations, each with as many held-out responses of about 1,000 characters as ``--prompts``
says, groups of prompts, a metric with parts, and 500 logged steps per training. Headless Chromium opens the page several times.
Writes one JSON file: machine, versions, settings; ``bytes``; for each time ``loaded_seconds`` (the browser's
load event: everything can be read and used), ``drawn_seconds`` (the last chart is drawn) and ``search_seconds`` (the first search
over all texts), and their medians.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.finetune import cpu_name, say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, run_program
from spin.alignment.core.provenance import Provenance
from spin.alignment.evaluation.averages import average_groups, average_nats, average_responses
from spin.alignment.evaluation.responses import write_responses
from tests.helpers import run_main
from tests.helpers.browser import CHROMIUM, Browser, browser
from tests.helpers.runs import tiny_run, write_config

ITERATIONS = 4
STEPS = 500
GROUPS = ("brainstorming", "coding", "extraction", "mathematics", "reasoning", "writing")
WORDS = 150  # of a response: about 1,000 characters
SEARCH = """(() => {
  const box = document.getElementById("sample-search"), started = performance.now();
  box.value = "word17"; box.dispatchEvent(new Event("input", { bubbles: true }));
  return (performance.now() - started) / 1000;
})()"""


def response_row(number: int, model: str, chance: random.Random, right: float) -> dict[str, Any]:
    """Return a held-out response of a model, which is right with the probability ``right``."""
    words = " ".join(f"word{chance.randrange(500)}" for _ in range(WORDS))
    followed = float(chance.random() < right), float(chance.random() < right)
    return {
        "prompt_id": f"p{number}",
        "model": model,
        "temperature": 0.0,
        "prompt": f"question {number} " * 20,
        "ground_truth": f"answer {number}",
        "response": f"{number} {words}",
        "token_ids": [chance.randrange(30_000) for _ in range(chance.randrange(100, 300))],
        "finish_reason": "stop" if chance.random() < 0.95 else "length",
        "score": min(followed),
        "nats": chance.uniform(40, 60),
        "tokens": 50,
        "group": GROUPS[number % len(GROUPS)],
        "parts": [
            {"name": name, "total": share, "count": 1.0}
            for name, share in zip(("form", "length"), followed, strict=True)
        ],
    }


def write_model(folder: Path, number: int, prompts: int) -> None:
    """Write the evaluation and the training log of model ``number``, 0 being the start."""
    folder.mkdir(parents=True)
    chance = random.Random(number)
    rows = [response_row(index, folder.name, chance, 0.5 + 0.08 * number) for index in range(prompts)]
    write_responses(folder / "eval.parquet", rows, Provenance(kind="evaluation"))
    result = {
        "metric": "ifeval",
        "n": prompts,
        "skipped": [],
        "temperatures": {"0": average_responses(rows)},
        "groups": average_groups({"0": rows}),
        **average_nats(rows),
        "samples": [],
    }
    (folder / "eval.json").write_text(json.dumps(result))
    if number:
        history = [
            {"step": step, "loss": 0.7 / step**0.5, "rewards/margins": chance.random(), "rewards/accuracies": 0.8}
            for step in range(1, STEPS + 1)
        ]
        metrics = {"first_loss": 0.6931, "seconds": 3600.0, "final": history[-1], "history": history}
        (folder / "metrics.json").write_text(json.dumps(metrics))


def write_run(folder: Path, prompts: int) -> Path:
    """Write the run's directory; return it."""
    run_dir = folder / "run"
    config = write_config(folder / "config.yaml", tiny_run(folder, iterations=ITERATIONS))
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text(config.read_text())
    for number, name in enumerate(("sft", *(f"iter{index}" for index in range(ITERATIONS)))):
        write_model(run_dir / name, number, prompts)
    return run_dir


def make_page(folder: Path, prompts: int) -> Path:
    """Write a run into a folder and let `spin report` make its page; return the page."""
    from spin import cli

    run_dir = write_run(folder, prompts)
    code, _, said = run_main(cli.main, "report", run_dir)
    if code:
        raise InputError(f"spin report ended with code {code}: {said}")
    return run_dir / "report.html"


def open_once(opened: Browser, page: Path) -> dict[str, float]:
    """Open the page; return the seconds until it is loaded and drawn, and those of a search."""
    opened.open("about:blank")
    started = time.monotonic()
    opened.open(page.as_uri())
    opened.wait_for("charts.areDrawn()")
    drawn = time.monotonic() - started
    loaded = opened.run("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    return {"loaded_seconds": loaded, "drawn_seconds": drawn, "search_seconds": opened.run(SEARCH)}


def measure(prompts: int, turns: int) -> dict[str, Any]:
    """Return the measurements as the module describes them."""
    with tempfile.TemporaryDirectory() as name:
        page = make_page(Path(name), prompts)
        found: dict[str, Any] = {"bytes": page.stat().st_size}
        with browser(Path(name)) as opened:
            opened.resize(1280)
            found["turns"] = [open_once(opened, page) for _ in range(turns)]
            if opened.problems:
                raise InputError(f"the page has problems: {opened.problems}")
    return found | {key: statistics.median(turn[key] for turn in found["turns"]) for key in found["turns"][0]}


def main(arguments: Sequence[str]) -> None:
    import os
    import platform
    import subprocess

    parser = Parser(prog="page.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--prompts", type=int, default=2000, help="held-out prompts that each of the five models answers"
    )
    parser.add_argument("--turns", type=int, default=5, help="how often the page is opened")
    options = parser.parse_args(list(arguments))
    if CHROMIUM is None:
        raise InputError("there is no Chromium: install one (Debian's package chromium)")
    if min(options.prompts, options.turns) < 1:
        raise InputError("--prompts and --turns must be at least 1")
    load = os.getloadavg()[0]
    found = measure(options.prompts, options.turns)
    version = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"chromium": version},
        "settings": {
            "iterations": ITERATIONS,
            "responses": options.prompts * (ITERATIONS + 1),
            "steps": STEPS,
            "load_average_at_start": load,
        },
        **found,
    }
    write_json_atomic(options.out, result)
    say(
        f"{found['bytes'] / 1e6:.1f} MB, loaded in {found['loaded_seconds']:.2f} s, drawn in {found['drawn_seconds']:.2f} s, "
        f"searched in {found['search_seconds']:.2f} s"
    )


if __name__ == "__main__":
    run_program(main)
