"""How many rows a second generation handles apart from the engine: the whole program, with one that answers at once, by stage.

    OMP_NUM_THREADS=1 python benchmarks/bookkeeping.py --out words.json
    OMP_NUM_THREADS=1 python benchmarks/bookkeeping.py --model models/SmolLM2-135M-Instruct --questions test.jsonl --out chat.json

Prompts have about 150 tokens, responses 100 to 200. spin/generate.py runs in this process on ``--rows`` prompts, after two runs
on a few rows (the first loads all libraries, the second shows what a start costs), each time in an empty folder. The processor
time of each stage is measured in the thread that runs it. Writes one JSON file: machine, versions, settings, ``start_seconds``
(processor time), ``stages`` (microseconds of processor time per row, and rows per second), ``all`` (rows per second of processor
time, without the engine and the start, and of wall time with both), each the median of ``--reps`` runs.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.finetune import cpu_name
from benchmarks.generation_data import SPLIT, VOCAB_SIZE, read_questions, save_model
from benchmarks.shapes import FIRST_WORD_ID, as_text
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, run_program
from spin.alignment.core.provenance import package_versions
from spin.alignment.generation import BACKENDS
from spin.alignment.generation.base import (
    BackendSettings,
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
)

WORDS_PROMPT, TOKENS_RESPONSE = 150, (100, 200)
IN_FLIGHT = 256
REST = "claim, stream, count, tell others"
_CANNED = 997  # responses, a prime number, so that they meet different prompts in every fraction
_FEW_ROWS = 64


def make_parser() -> Parser:
    parser = Parser(prog="bookkeeping.py", description="Rows per second of everything in generation but the engine.")
    add = parser.add_argument
    add("--model", default=None, help="folder of a chat model (default: a random one with a tokenizer of whole words)")
    add(
        "--questions",
        default=None,
        help="with --model: JSON lines file with the key question, joined to longer prompts",
    )
    add("--rows", type=int, default=40_000, help="prompts of a run")
    add("--frac_len", type=int, default=10_000, help="prompts of a fraction")
    add("--num_samples", type=int, default=1, help="responses per prompt; a row each")
    add("--reps", type=int, default=3, help="measured runs")
    add("--out", required=True, help="JSON file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before anything is loaded.

    Raises:
        InputError: a flag is out of range, or one of two that belong together is missing.
    """
    for name in ("rows", "frac_len", "num_samples", "reps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}: set it to 1 or more")
    if (options.model is None) != (options.questions is None):
        raise InputError("model and questions require each other: give both or neither")


class CannedBackend(GenerationBackend):
    """Answers at once, out of order like an engine with many requests in flight, with responses that exist already."""

    answers: Sequence[list[int]] = ()

    def __init__(self, settings: BackendSettings) -> None:
        stop = settings.stop_ids[0]
        self._responses = [Response([*ids, stop], "stop") for ids in self.answers]

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        in_flight: list[int] = []
        for number, _ in enumerate(requests):
            in_flight.append(number)
            if len(in_flight) == IN_FLIGHT:
                yield self._answer(in_flight.pop(number * 37 % IN_FLIGHT), sampling.num_samples)
        for number in in_flight:
            yield self._answer(number, sampling.num_samples)

    def _answer(self, number: int, samples: int) -> tuple[int, list[Response]]:
        return number, [self._responses[(number + sample) % len(self._responses)] for sample in range(samples)]

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class Stages:
    """Processor seconds by stage, measured in whichever thread runs it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._undo: list[tuple[type, str, Any]] = []

    def watch(self, owner: type, name: str, stage: str) -> None:
        """Measure a method until :meth:`restore`."""
        kept = owner.__dict__[name]
        inner = kept.__func__ if isinstance(kept, staticmethod) else kept

        @functools.wraps(inner)
        def timed(*arguments: Any, **more: Any) -> Any:
            started = time.thread_time()
            try:
                return inner(*arguments, **more)
            finally:
                self.seconds[stage] += time.thread_time() - started

        setattr(owner, name, staticmethod(timed) if isinstance(kept, staticmethod) else timed)
        self._undo.append((owner, name, kept))

    def restore(self) -> None:
        for owner, name, kept in self._undo:
            setattr(owner, name, kept)


def watched() -> Stages:
    """Return the stages of the program, watched from now on."""
    from spin.alignment.data.prompt_store import PromptStore
    from spin.alignment.generation.fraction_journal import FractionJournal
    from spin.alignment.generation.fraction_work import FractionWork, GenerationJob

    stages = Stages()
    for owner, name, stage in (
        (PromptStore, "create", "read, check and hash the rows, write the store"),
        (GenerationJob, "encode", "render the template, encode"),
        (FractionWork, "finish", "decode"),
        (FractionWork, "write", "build rows, write parts"),
        (FractionJournal, "merge", "merge"),
        (CannedBackend, "_answer", "engine"),
    ):
        stages.watch(owner, name, stage)
    return stages


def save_rows(options: Any, folder: Path, name: str, count: int) -> Path:
    """Write a data set of prompts with ground truths of the same length; no two prompts are equal."""
    texts = _questions(options) if options.model else _words()
    file = folder / name / f"{SPLIT}.jsonl"
    file.parent.mkdir()
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            prompt, answer = texts[number % len(texts)], texts[number * 7 % len(texts)]
            row = {"prompt_id": f"prompt-{number}", "prompt": prompt, "response": answer}
            lines.write(json.dumps(row) + "\n")
    return file.parent


def _words() -> list[str]:
    numbers = np.random.default_rng(0).integers(FIRST_WORD_ID, VOCAB_SIZE, (_CANNED, WORDS_PROMPT))
    return [as_text(row.tolist()).strip() for row in numbers]


def _questions(options: Any) -> list[str]:
    questions = read_questions(Path(options.questions), _CANNED)
    return [f"{one} {other}" for one, other in zip(questions, questions[1:] + questions[:1], strict=True)]


def canned_answers(options: Any, model: Path) -> list[list[int]]:
    """Return the ids of texts like the prompts, cut or joined to lengths that are uniform over ``TOKENS_RESPONSE``."""
    from spin.alignment.data.chat_encoder import load_tokenizer

    encoded = load_tokenizer(model)(_questions(options) if options.model else _words(), add_special_tokens=False)
    pool = [token for ids in encoded["input_ids"] for token in ids]
    lengths = np.random.default_rng(1).integers(TOKENS_RESPONSE[0], TOKENS_RESPONSE[1] + 1, _CANNED).tolist()
    starts = (number * 131 % (len(pool) - TOKENS_RESPONSE[1]) for number in range(_CANNED))
    return [pool[start : start + length - 1] for start, length in zip(starts, lengths, strict=True)]


def run(options: Any, model: Path, data: Path, output: Path) -> dict[str, float]:
    """Run the program once; return the processor seconds of its stages, and of both clocks in all."""
    from spin.generate import main as generate

    flags = {"model": model, "input_dir": data, "output_dir": output, "split": SPLIT, "backend": "canned"}
    flags |= {"data_frac": "auto", "frac_len": options.frac_len, "num_samples": options.num_samples}
    flags |= {"max_new_tokens": TOKENS_RESPONSE[1], "flush_every": 512}
    stages = watched()
    started, processor = time.perf_counter(), time.process_time()
    try:
        generate([f"--{name}={value}" for name, value in flags.items()])
    finally:
        stages.restore()
    spent = {"wall": time.perf_counter() - started, "processor": time.process_time() - processor}
    engine = stages.seconds.pop("engine")
    own = spent["processor"] - engine
    rest = own - sum(stages.seconds.values())
    return {**stages.seconds, REST: rest, "all": own, "wall": spent["wall"]}


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """Run the program twice on a few rows, then ``reps`` times on all; return rates and times."""
    model = Path(options.model) if options.model else folder / "model"
    if not options.model:
        save_model(model, 0)
    CannedBackend.answers = canned_answers(options, model)
    few, data = save_rows(options, folder, "few", _FEW_ROWS), save_rows(options, folder, "data", options.rows)
    run(options, model, few, folder / "first")
    start = run(options, model, few, folder / "second")[REST]
    turns = [run(options, model, data, folder / f"run-{number}") for number in range(options.reps)]
    rows = options.rows * options.num_samples
    for turn in turns:
        turn[REST] -= start
        turn["all"] -= start
    found = {name: [rows / turn[name] for turn in turns] for name in turns[0]}
    own, wall = found.pop("all"), found.pop("wall")
    return {
        "start_seconds": start,
        "stages": {
            name: {"rows_per_core_second": median(rates), "microseconds": 1e6 / median(rates)}
            for name, rates in found.items()
        },
        "all": {
            "rows_per_core_second": median(own),
            "spread_per_core_second": [min(own), max(own)],
            "rows_per_second": median(wall),
        },
    }


def describe(options: Any) -> dict[str, Any]:
    """Return machine, versions and settings of the run."""
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "questions")}
    settings["model"] = Path(options.model).name if options.model else None
    system = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    return {
        "machine": system | {"load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | package_versions(),
        "settings": settings,
    }


def table(result: dict[str, Any]) -> str:
    """Return the table that people read."""
    lines = [f"{'':<50}{'us/row':>10}{'rows/s':>12}"]
    for name, facts in result["stages"].items():
        lines.append(f"{name:<50}{facts['microseconds']:>10.1f}{facts['rows_per_core_second']:>12,.0f}")
    lines.append(f"{'start (s)':<50}{result['start_seconds']:>10.2f}")
    whole = result["all"]
    rate = whole["rows_per_core_second"]
    lines.append(f"{'all, processor time':<50}{1e6 / rate:>10.1f}{rate:>12,.0f}")
    lines.append(f"{'all, wall time':<50}{1e6 / whole['rows_per_second']:>10.1f}{whole['rows_per_second']:>12,.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    check_options(options)
    result = describe(options)
    BACKENDS["canned"] = CannedBackend
    try:
        with tempfile.TemporaryDirectory() as folder:
            result |= measure(options, Path(folder))
    finally:
        del BACKENDS["canned"]
    write_json_atomic(Path(options.out), result)
    print(table(result))


if __name__ == "__main__":
    run_program(main)
