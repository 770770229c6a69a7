"""Measures how long preference training takes from its start to the end of its first step, and the memory of its processes.

    python benchmarks/start_of_training.py --rows 10000 100000 --out benchmarks/results/start-of-training-cpu.json

The model is tiny and the loss needs no reference, so what remains is the start of Python and its libraries and the work on the
rows. Each case is run twice: with an empty cache (``cold``: the rows are encoded) and again into another folder (``warm``).
Results of an existing file are kept and those of the same case replaced, so that long cases can be measured one by one. See
``benchmarks/README.md``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil

from benchmarks.finetune import cpu_name, say
from benchmarks.shapes import make_tokenizer
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program
from spin.alignment.core.provenance import package_versions
from spin.alignment.methods.losses import LossInputs, LossOutputs
from spin.alignment.methods.losses.base import Loss

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = (50, 36, 36)  # of a prompt, a chosen and a rejected response
WATCH_SECONDS = 0.25
_CHUNK = 10_000
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def margin(inputs: LossInputs) -> LossOutputs:
    """Return the difference of the responses' log-probs: a loss without a reference, whose pass over all pairs would count."""
    chosen, rejected = (inputs.policy_logps * inputs.completion_mask).sum(dim=1).chunk(2)
    return LossOutputs(rejected - chosen, chosen.detach(), rejected.detach())


LOSS = Loss(margin, needs_reference=False)


def make_parser() -> Parser:
    parser = Parser(prog="start_of_training.py", description="Seconds to the first step of training, and its memory.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="pairs of each case")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes of each case")
    parser.add_argument("--workers", type=int, default=1, help="preprocessing_num_workers")
    parser.add_argument(
        "--tokenizer", default="", help="folder with a real chat tokenizer (default: one of whole words)"
    )
    parser.add_argument("--code", default=str(REPOSITORY), help="checkout whose program is measured")
    parser.add_argument("--name", default="", help="prefix of the cases' names, such as that of another checkout")
    parser.add_argument("--folder", default="", help="keep model, data and cache here, so that a later call finds them")
    parser.add_argument("--kinds", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--out", required=True, help="JSON file to write, or to add to")
    return parser


def save_model(folder: Path, tokenizer_folder: str) -> Any:
    """Write a tiny random model with a tokenizer, unless it exists; return the tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder) if tokenizer_folder else make_tokenizer(32_000)
        tokenizer.chat_template = tokenizer.chat_template or _TEMPLATE
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **tokens)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_pairs(folder: Path, rows: int, tokenizer: Any) -> Path:
    """Write pairs of random words, as spin/convert_data.py writes them: the rejected response with its ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spin.alignment.data.rows import PREFERENCE_SCHEMA

    path = folder / "train_prefs.parquet"
    if path.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # Tokens that are words: their ids decode to the words with spaces between them.
    tokens = [token for token in range(100, min(20_000, len(tokenizer))) if _is_word(token, tokenizer)]
    words = {token: tokenizer.decode([token]).strip() for token in tokens}
    rng = np.random.default_rng(0)
    written = path.with_suffix(".part")
    with pq.ParquetWriter(written, PREFERENCE_SCHEMA) as writer:
        for start in range(0, rows, _CHUNK):
            ids = rng.choice(tokens, (min(_CHUNK, rows - start), sum(WORDS))).tolist()
            found = [_pair(start + number, row, words, tokenizer.eos_token_id) for number, row in enumerate(ids)]
            writer.write_table(pa.Table.from_pylist(found, PREFERENCE_SCHEMA))
    written.rename(path)
    return folder


def _is_word(token: int, tokenizer: Any) -> bool:
    text = tokenizer.decode([token, token])
    return text.isascii() and text.replace(" ", "").isalnum() and len(text.split()) == 2


def _pair(number: int, ids: list[int], words: Mapping[int, str], end_id: int) -> dict[str, Any]:
    ends = np.cumsum(WORDS).tolist()
    prompt, chosen, rejected = (ids[start:end] for start, end in zip((0, *ends), ends, strict=False))
    texts = [" ".join(words[token] for token in part) for part in (prompt, chosen, rejected)]
    turns = [{"role": "user", "content": texts[0]}]
    sides = {
        side: [*turns, {"role": "assistant", "content": text}]
        for side, text in zip(("chosen", "rejected"), texts[1:], strict=True)
    }
    stop = {"rejected_token_ids": [*rejected, end_id], "rejected_finish_reason": "stop"}
    return {"prompt_id": f"p{number}", "sample_index": 0, **sides, **stop}


class MemoryOfProcesses:
    """Peak memory of the processes of a training, sampled while it runs. ``facts`` are in MiB.

    ``anonymous`` is what a process has for itself, without mapped files; ``proportional`` counts pages that several processes
    share in parts (PSS), added up over all processes.
    """

    def __init__(self, root: int) -> None:
        self._root, self._end = root, threading.Event()
        self._peaks: dict[int, dict[str, float]] = {}
        self._total = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(WATCH_SECONDS):
            with contextlib.suppress(psutil.Error):  # the training has just ended
                root = psutil.Process(self._root)
                self._total = max(self._total, sum(map(self._sample, [root, *root.children(recursive=True)])))

    def _sample(self, process: psutil.Process) -> float:
        """Note the memory of a process, if it trains, and return its share."""
        try:
            command = process.cmdline()
            is_launcher = any("accelerate" in word for word in command)
            if is_launcher or not any(word.endswith("run_spin.py") for word in command):
                return 0.0
            found = _memory(process.pid)
        except (OSError, psutil.Error):
            return 0.0
        peak = self._peaks.setdefault(process.pid, found)
        peak |= {name: max(value, peak[name]) for name, value in found.items()}
        return found["proportional"]

    def facts(self) -> dict[str, Any]:
        """Stop; return the peaks of each process, the largest first, and that of the sum."""
        self._end.set()
        self._thread.join()
        peaks = sorted(self._peaks.values(), key=lambda peak: -peak["anonymous"])
        return {"memory_of_processes": peaks, "memory_of_all": round(self._total, 1)}


def _memory(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    names = {"resident": "Rss", "anonymous": "Anonymous", "proportional": "Pss"}
    return {ours: round(kib[theirs] / 1024, 1) for ours, theirs in names.items()}


def start_training(config: Path, processes: int, code: Path, cache: Path) -> dict[str, Any]:
    """Train for one step; return the seconds until it has ended and the memory until then.

    Raises:
        InputError: the training failed; the message ends with its output.
    """
    launch: list[str] = []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/cpu.yaml"]
        launch += ["--num_processes", str(processes), "--main_process_port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}
    environment["PYTHONPATH"] = f"{code}{os.pathsep}{REPOSITORY}"
    started, said = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, *launch, "spin/run_spin.py", str(config)],
        cwd=code,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    memory, seconds = MemoryOfProcesses(process.pid), 0.0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if not seconds and "'loss'" in line:
                seconds = time.monotonic() - started
        if process.wait() or not seconds:
            raise InputError(f"the training of {config} failed: {''.join(said)[-3000:]}")
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(
                recursive=True
            ):  # a launcher's have sessions of their own
                child.kill()
            process.kill()
    return {"seconds_to_first_step": round(seconds, 1), **memory.facts()}


def write_config(folder: Path, model: Path, pairs: Path, workers: int) -> Path:
    import yaml

    folder.mkdir(parents=True)
    values = {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(pairs): 1.0},
        "output_dir": str(folder / "out"),
        "preprocessing_num_workers": workers,
        "loss_type": "benchmarks.start_of_training:LOSS",
        "use_cpu": True,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 512,
        "max_prompt_length": 256,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def measure(options: Any, folder: Path, add: Any) -> None:
    """Measure every case and pass it to ``add``."""
    tokenizer = save_model(folder / "model", options.tokenizer)
    for rows in options.rows:
        pairs = save_pairs(folder / f"pairs-{rows}", rows, tokenizer)
        for processes in options.processes:
            name = f"{options.name}{rows} rows, {processes} processes, {options.workers} workers"
            cache = folder / "caches" / f"{options.name.strip(': ')}{rows}"
            for kind in options.kinds:
                if kind == "cold":
                    shutil.rmtree(cache, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    config = write_config(Path(place) / kind, folder / "model", pairs, options.workers)
                    load = os.getloadavg()[0]
                    facts = start_training(config, processes, Path(options.code).resolve(), cache)
                facts |= {
                    "rows": rows,
                    "processes": processes,
                    "workers": options.workers,
                    "load_average": round(load, 1),
                }
                say(f"{name}, {kind}: {facts['seconds_to_first_step']} s, {facts['memory_of_processes']}")
                add(name, kind, facts)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    interrupt_on_signals()
    out = Path(options.out)
    cases: dict[str, Any] = json.loads(out.read_text())["cases"] if out.exists() else {}
    settings: Mapping[str, Any] = {
        "words": WORDS,
        "tokenizer": Path(options.tokenizer).name or "whole words",
        "model": "2 layers of width 32",
    }

    def add(name: str, kind: str, facts: Mapping[str, Any]) -> None:
        cases.setdefault(name, {})[kind] = facts
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
        write_json_atomic(
            out, {"machine": machine, "versions": package_versions(), "settings": settings, "cases": cases}
        )

    with tempfile.TemporaryDirectory() as temporary:
        measure(options, Path(options.folder or temporary).absolute(), add)


if __name__ == "__main__":
    run_program(main)
