"""Generation and gathering of many rows without a model: how fast everything around one is, and whether its memory stays flat.

As a program (``python -m benchmarks.generation_scale STEP flags``) it runs one step in this process and prints what that took.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.generation_data import SPLIT, VOCAB_SIZE
from benchmarks.harness import REPOSITORY, peak_bytes
from benchmarks.shapes import FIRST_WORD_ID, as_text
from spin.alignment.core.program import run_program
from spin.alignment.generation import BACKENDS
from spin.alignment.generation.base import (
    BackendSettings,
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    sample_seed,
)

PROMPT_CHARACTERS, GROUND_TRUTH_CHARACTERS = 100, 500
FRACTION_ROWS = 20_000
IN_FLIGHT = 256
LONGEST_ANSWER = 160  # tokens; 80 in the mean, about 480 characters
WATCH_SECONDS = 0.05
_CHUNK = 10_000
_POOL_WORDS = 100_000


def save_many(folder: Path, rows: int) -> None:
    """Write a data set of synthetic prompts and ground truths, whole words, as one parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = as_text(np.random.default_rng(0).integers(FIRST_WORD_ID, VOCAB_SIZE, _POOL_WORDS).tolist())
    starts = [place for place in range(len(text) - GROUND_TRUTH_CHARACTERS - 8) if text[place] == " "]
    schema = pa.schema([(name, pa.string()) for name in ("prompt_id", "prompt", "response")])
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / f"{SPLIT}.parquet", schema) as writer:
        for begin in range(0, rows, _CHUNK):
            numbers = range(begin, min(begin + _CHUNK, rows))
            columns = [
                [f"prompt-{number}" for number in numbers],
                [_words(text, starts[number * 31 % len(starts)], PROMPT_CHARACTERS) for number in numbers],
                [_words(text, starts[number * 37 % len(starts)], GROUND_TRUTH_CHARACTERS) for number in numbers],
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _words(text: str, start: int, characters: int) -> str:
    """Return about so many characters from a blank on, without the word that is cut."""
    return text[start : start + characters + 1].strip().rpartition(" ")[0]


class InstantBackend(GenerationBackend):
    """Answers at once with ids from a pool, out of order like an engine that has many requests in flight."""

    def __init__(self, settings: BackendSettings) -> None:
        self._stop = settings.stop_ids[0]
        self._pool = np.random.default_rng(1).integers(FIRST_WORD_ID, VOCAB_SIZE, _POOL_WORDS).tolist()

    def stream(
        self, requests: Iterable[PromptRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        in_flight: list[tuple[int, PromptRequest]] = []
        for number, request in enumerate(requests):
            in_flight.append((number, request))
            if len(in_flight) == IN_FLIGHT:
                yield self._answer(*in_flight.pop(number * 37 % IN_FLIGHT), sampling)
        for number, request in in_flight:
            yield self._answer(number, request, sampling)

    def _answer(self, number: int, request: PromptRequest, sampling: SamplingConfig) -> tuple[int, list[Response]]:
        responses = []
        for sample in range(sampling.num_samples):
            seed = sample_seed(sampling.seed, request.prompt_id, sample)
            start = seed // LONGEST_ANSWER % (_POOL_WORDS - LONGEST_ANSWER)
            responses.append(Response([*self._pool[start : start + seed % LONGEST_ANSWER], self._stop], "stop"))
        return number, responses

    def close(self) -> None:
        """There is nothing to free."""


class MemoryWatch:
    """The peaks of this process's memory while a block runs."""

    def __enter__(self) -> MemoryWatch:
        self._anonymous = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._end.wait(WATCH_SECONDS):
            memory = own.memory_info()
            self._anonymous = max(self._anonymous, memory.rss - memory.shared)

    def facts(self) -> dict[str, int]:
        """Return the peak of resident memory, and that without pages of files, which the system takes back when it needs them."""
        return {"peak_bytes": peak_bytes("cpu"), "peak_anonymous_bytes": self._anonymous}


def run_step(step: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run a program of this project in this process; return its seconds on both clocks and its memory peaks."""
    from spin.convert_data import main as convert
    from spin.generate import main as generate

    BACKENDS["instant"] = InstantBackend
    started, processor = time.perf_counter(), time.process_time()
    with MemoryWatch() as watch:
        (generate if step == "generate" else convert)(arguments)
    seconds = {"wall_seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    return {**seconds, **watch.facts()}


def measure_step(step: str, flags: dict[str, Any], log: Path, threads: int) -> dict[str, float]:
    """Run a step in a process of its own.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    words = [f"--{name}={value}" for name, value in flags.items()]
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.generation_scale", step, *words],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError("\n".join([f"{step} ended with code {done.returncode}; the end of its log:", *lines[-15:]]))
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def measure_scale(rows: int, model_folder: Path, folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """Generate and gather ``rows`` rows; return for each step its rates, rows per second of either clock, and its peaks."""
    data, made, pairs = (folder / name for name in ("data", "generated", "pairs"))
    save_many(data, rows)
    generate = {
        "model": model_folder,
        "input_dir": data,
        "output_dir": made,
        "split": SPLIT,
        "backend": "instant",
        "data_frac": "auto",
        "frac_len": FRACTION_ROWS,
        "max_new_tokens": LONGEST_ANSWER,
        "flush_every": 512,
    }
    found = {"generate": measure_step("generate", generate, folder / "generate.txt", threads)}
    gather = {"input_dir": made, "output_dir": pairs}
    found["gather"] = measure_step("gather", gather, folder / "gather.txt", threads)
    shutil.rmtree(folder)
    for facts in found.values():
        facts["rows_per_second"] = rows / facts["wall_seconds"]
        facts["rows_per_core_second"] = rows / facts["processor_seconds"]
    return found


def main(arguments: Sequence[str]) -> None:
    # What the programs print goes to the log, the numbers to a pipe of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answers.write(json.dumps(run_step(arguments[0], arguments[1:])))
    answers.flush()


if __name__ == "__main__":
    run_program(main)
