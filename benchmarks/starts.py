"""Measures the cost of starting a program: each program does a minimal job, started as a new process and from the start server.

    python benchmarks/starts.py --out benchmarks/results/starts-cpu.json

Both kinds take turns, program by program, so that a slowdown of the machine affects both. Writes one JSON file: machine,
versions, settings; ``server`` (the cost of starting it, once per run); ``programs.NAME.plain`` and ``.served`` (medians over
the turns of ``seconds`` and ``processor_seconds`` from the start to the end of the job; ``asked``, the seconds until the program
exists; ``turns``, the values of each turn); ``sum`` of the medians over all programs. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.finetune import cpu_name, say
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program
from spin.alignment.core.provenance import package_versions
from spin.alignment.pipeline.processes import python_command
from spin.alignment.pipeline.start_programs import PROGRAMS, ProgramStarter

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("plain", "served")
# In an order in which each program finds its input.
PROGRAM_NAMES = (
    "reformat",
    "run_sft",
    "generate",
    "convert_data",
    "run_spin",
    "estimate_weights",
    "evaluate_model",
    "run_online",
)
TRAINING = {
    "use_cpu": True,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "max_length": 64,
    "max_prompt_length": 32,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_parser() -> Parser:
    parser = Parser(prog="starts.py", description="Time of program starts, plain and from the start server.")
    parser.add_argument("--turns", type=int, default=3, help="turns of each kind")
    parser.add_argument(
        "--programs", nargs="+", default=None, help="only these programs; later ones read the output of earlier ones"
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser


def write_data(folder: Path, rows: int = 8) -> Path:
    """Write the first rows of the demo's data."""
    import pyarrow.parquet as pq

    folder.mkdir()
    for split in ("train", "test"):
        table = pq.read_table(REPOSITORY / "data" / "iter0" / f"{split}.parquet")
        pq.write_table(table.slice(0, rows), folder / f"{split}.parquet")
    return folder


def make_jobs(root: Path, data: Path) -> dict[str, list[str]]:
    """Return the command of each program."""
    model, generated, pairs = root / "sft", root / "generated", root / "pairs"
    sft = {"model_name_or_path": REPOSITORY / "data" / "iter0" / "model", "dataset_mixer": {data: 1.0}}
    sft |= {"dataset_splits": ["train"], "output_dir": model, "init_from_config": True}
    spin = {"model_name_or_path": model, "dataset_mixer": {pairs: 1.0}, "output_dir": root / "spin"}
    online = {"model_name_or_path": model, "dataset_mixer": {data: 1.0}, "dataset_splits": ["train"]}
    online |= {"output_dir": root / "online", "max_new_tokens": 4, "num_samples": 2, "scorer": "length_penalty"}
    short = ["--max_new_tokens", "4", "--batch_size", "8"]
    arguments = {
        "reformat": ["--data", data / "train.parquet", "--output_dir", root / "reformatted"],
        "run_sft": [write_config(root / "sft.yaml", sft)],
        "generate": ["--model", model, "--input_dir", data, "--output_dir", generated, *short],
        "convert_data": ["--input_dir", generated, "--output_dir", pairs],
        "run_spin": [write_config(root / "spin.yaml", spin)],
        "estimate_weights": [
            *("--input_dir", pairs, "--output_dir", root / "weighed", "--weighting", "reverse_dpo"),
            *("--model_plus", root / "spin", "--model_minus", model),
        ],
        "evaluate_model": ["--model", model, "--input_dir", data, "--output_file", root / "eval.json", *short],
        "run_online": [write_config(root / "online.yaml", online)],
    }
    return {name: python_command(PROGRAMS / f"{name}.py", list(map(str, arguments[name]))) for name in PROGRAM_NAMES}


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: plain(value) for key, value in {**TRAINING, **values}.items()}))
    return path


def processor_seconds(server: int | None) -> float:
    """Return the processor time so far of the server's children or, without a server, of this process's children."""
    if server is None:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def take_turn(starter: ProgramStarter, command: list[str], log: Path) -> dict[str, float]:
    """Run one job until it ends.

    Raises:
        InputError: it failed; the message ends with its output.
    """
    before, started = processor_seconds(starter.server_pid), time.monotonic()
    with log.open("wb") as output:
        program = starter.start(command, output.fileno(), output.fileno())
        asked = time.monotonic() - started
        code = program.wait()
    seconds = time.monotonic() - started
    if code:
        raise InputError(f"{' '.join(command)} ended with {code}: {log.read_text(errors='replace')[-2000:]}")
    used = processor_seconds(starter.server_pid) - before
    return {"asked": round(asked, 4), "seconds": round(seconds, 3), "processor_seconds": round(used, 2)}


def measure(turns: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Return the result: the cost of the server, and every turn of every program."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    starters = {
        "plain": ProgramStarter({**environment, "SPIN_PLAIN_STARTS": "1"}),
        "served": ProgramStarter(environment),
    }
    started = time.monotonic()
    starters["served"].prepare(python_command(PROGRAMS / "run_sft.py", []))
    if starters["served"].problem is not None:
        raise InputError(f"the start server is not available here: {starters['served'].problem}")
    server: dict[str, Any] = {"ready_seconds": round(time.monotonic() - started, 2)}
    status = Path(f"/proc/{starters['served'].server_pid}/stat").read_text().rpartition(")")[2].split()
    server["processor_seconds"] = (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")
    taken: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_data(root / "data")
        for turn in range(turns):
            jobs = {kind: make_jobs(root / f"{kind}-{turn}", data) for kind in KINDS}
            for name in names or PROGRAM_NAMES:
                for kind in KINDS:
                    facts = take_turn(starters[kind], jobs[kind][name], root / "log")
                    taken.setdefault(name, {}).setdefault(kind, []).append(facts)
                    say(
                        f"{name} {kind}: {facts['seconds']:.2f} s, {facts['processor_seconds']:.2f} s of processor time"
                    )
    programs = {name: {kind: summarize(values) for kind, values in kinds.items()} for name, kinds in taken.items()}
    return {"server": server, "programs": programs, "sum": {kind: add_up(programs, kind) for kind in KINDS}}


def summarize(turns: list[dict[str, float]]) -> dict[str, Any]:
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} | {"turns": turns}


def add_up(programs: Mapping[str, Any], kind: str) -> dict[str, float]:
    return {
        key: round(sum(program[kind][key] for program in programs.values()), 2)
        for key in ("seconds", "processor_seconds")
    }


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.turns < 1:
        raise InputError(f"turns is {options.turns}: set it to 1 or more")
    for name in options.programs or ():
        lookup(dict.fromkeys(PROGRAM_NAMES), name, "program")
    interrupt_on_signals()
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": package_versions(),
        "settings": {"turns": options.turns, "load_average_at_start": os.getloadavg()[0]},
        **measure(options.turns, options.programs),
    }
    write_json_atomic(Path(options.out), result)
    say(f"wrote {options.out}; sums: {result['sum']}")


if __name__ == "__main__":
    run_program(main)
