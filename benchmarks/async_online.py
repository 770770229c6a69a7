"""What sampling ahead gains: steps of online training with a vLLM server, with ``async_steps: 0`` and 1, in turns.

The server and the training have cores of their own, as they would have GPUs of their own::

    python benchmarks/async_online.py --out benchmarks/results/async-online-cpu.json    # about ten minutes on two CPU cores
    python benchmarks/async_online.py --model MODEL --out results.json                  # a chat model instead of a random one

A turn is a whole run of ``spin/run_online.py``; its first two steps do not count, nor does the last, which samples nothing ahead.
Writes one JSON file: machine, versions, settings, and for each of both contenders the medians over the turns of the seconds of a
step (``step``), of its parts as the training logs them, of sending the weights (part of ``generate``), and of the training's
processor time; ``ratio`` is sync / async in ``step`` (above 1, sampling ahead is faster), ``ratio_spread`` its extremes over the
turns, and ``limit`` the ratio that perfect overlap of everything but sending the weights would have. Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.finetune import cpu_name, say
from benchmarks.vllm_server import serving
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program
from spin.alignment.core.provenance import package_versions

REPOSITORY = Path(__file__).resolve().parent.parent
CONTENDERS = {"sync": 0, "async": 1}  # async_steps
WARM_UP_STEPS, LAST_STEPS = 2, 1
PARTS = ("generate", "label", "reference", "update")


def make_parser() -> Parser:
    parser = Parser(prog="async_online.py", description="Speed of online training that samples ahead.")
    add = parser.add_argument
    add("--model", default=None, help="folder of a chat model (default: a random model of 4.3M parameters)")
    add("--turns", type=int, default=3, help="turns of each contender")
    add("--steps", type=int, default=8, help="measured steps of a turn")
    add("--prompts", type=int, default=16, help="prompts of a step")
    add("--samples", type=int, default=4, help="responses per prompt")
    add("--max_new_tokens", type=int, default=64, help="longest response in tokens")
    add("--server_cores", type=int, nargs="+", default=[1], help="cores of the server")
    add("--training_cores", type=int, nargs="+", default=[0], help="cores of the training")
    add("--seed", type=int, default=0, help="seed of weights, prompts and responses")
    add("--out", required=True, help="JSON file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before anything is started.

    Raises:
        InputError: a flag is out of range.
    """
    for name, lowest in (("turns", 1), ("steps", 1), ("prompts", 1), ("samples", 2), ("max_new_tokens", 1)):
        if getattr(options, name) < lowest:
            raise InputError(f"{name} is {getattr(options, name)}: set it to {lowest} or more")
    known = os.sched_getaffinity(0)
    for name in ("server_cores", "training_cores"):
        for core in getattr(options, name):
            if core not in known:
                raise InputError(f"{name} names core {core}, but there are {sorted(known)}: name some of these")
    if shared := set(options.server_cores) & set(options.training_cores):
        raise InputError(f"core {min(shared)} is of both server_cores and training_cores: give each its own")


def score(prompt: str, response: str, reference: str) -> float:
    """Return a reward between 0 and 1 that any two responses differ in."""
    return crc32(response.encode()) / 2**32


def command_on(cores: Sequence[int], *command: str) -> list[str]:
    """Return a command that runs only on these cores."""
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]


def environment(cores: Sequence[int], **more: str) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(len(cores))}
    return {**os.environ, **own, "PYTHONPATH": str(REPOSITORY), **more}


def server_of(model: Path, options: Any, log: Path) -> AbstractContextManager[str]:
    """Start the server on its own cores; enter for its address (see :func:`benchmarks.vllm_server.serving`)."""
    from spin.alignment.generation.openai.policy_server import RECEIVER

    flags = ["--generation-config", "vllm", "--max-model-len", "512", "--worker-extension-cls", RECEIVER]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    cores = options.server_cores
    return serving(model, log, flags, environment(cores, **settings), prefix=command_on(cores))


def values_of(model: Path, data: Path, folder: Path, url: str, async_steps: int, options: Any) -> dict[str, Any]:
    """Return the configuration of a turn."""
    return {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(data): 1.0},
        "dataset_splits": ["train"],
        "output_dir": str(folder),
        "use_cpu": True,
        "backend": "openai",
        "server_url": url,
        "async_steps": async_steps,
        "max_steps": WARM_UP_STEPS + options.steps + LAST_STEPS,
        "per_device_train_batch_size": options.prompts,
        "num_samples": options.samples,
        "max_new_tokens": options.max_new_tokens,
        "max_prompt_length": 320,
        "max_length": 320 + options.max_new_tokens,
        "scorer": "benchmarks.async_online:score",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "seed": options.seed,
    }


def take_turn(values: Mapping[str, Any], options: Any, folder: Path) -> dict[str, float]:
    """Run one training; return the medians over its measured steps.

    Raises:
        InputError: it failed; the message ends with its output.
    """
    folder.mkdir()
    config, times = folder / "online.json", folder / "times.json"
    config.write_text(json.dumps(values))  # JSON is YAML too
    program = [sys.executable, "-m", "benchmarks.async_online_steps", str(config), str(times)]
    done = subprocess.run(
        command_on(options.training_cores, *program),
        cwd=REPOSITORY,
        env=environment(options.training_cores),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(f"a training ended with {done.returncode}: {done.stderr[-2000:]}")
    history = json.loads((Path(values["output_dir"]) / "metrics.json").read_text())["history"]
    logged = [entry for entry in history if "seconds/generate" in entry]
    return medians_of(json.loads(times.read_text()), logged, options.steps)


def medians_of(
    ends: Sequence[Mapping[str, float]], logged: Sequence[Mapping[str, float]], steps: int
) -> dict[str, float]:
    """Return the medians over the measured steps of a turn, from the clocks at the end of every step and what was logged."""
    first, last = WARM_UP_STEPS, WARM_UP_STEPS + steps
    found = {}
    for name, clock in (("step", "wall"), ("processor", "processor"), ("sending", "sending")):
        found[name] = statistics.median(ends[step][clock] - ends[step - 1][clock] for step in range(first, last))
    for part in PARTS:
        found[part] = statistics.median(entry[f"seconds/{part}"] for entry in logged[first:last])
    found["staleness"] = statistics.median(entry["staleness"] for entry in logged[first:last])
    return found


def summarize(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return the medians of each contender over its turns, and what they say about each other."""
    medians = {
        name: {key: statistics.median(turn[key] for turn in some) for key in some[0]} | {"turns": list(some)}
        for name, some in turns.items()
    }
    ratios = [one["step"] / other["step"] for one, other in zip(turns["sync"], turns["async"], strict=True)]
    step, generate, sending = (medians["sync"][name] for name in ("step", "generate", "sending"))
    return {
        "contenders": medians,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "limit": step / (sending + max(generate - sending, step - generate)),
    }


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """Let both contenders take their turns with one server, in an order that reverses every time."""
    from benchmarks.generation_data import make_prompts, save_model, save_prompts

    model = folder / "model" if options.model is None else Path(options.model)
    if options.model is None:
        save_model(model, options.seed)
    steps = WARM_UP_STEPS + options.steps + LAST_STEPS
    save_prompts(folder / "data", make_prompts(options.prompts * steps, 0, options.seed))
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with server_of(model, options, folder / "server.log") as url:
        for turn in range(options.turns):
            for name in sorted(CONTENDERS, reverse=turn % 2 == 0):
                own = folder / f"{name}-{turn}"
                values = values_of(model, folder / "data", own / "out", url, CONTENDERS[name], options)
                turns[name].append(take_turn(values, options, own))
                say(f"turn {turn + 1}, {name}: {turns[name][-1]['step']:.2f} s per step")
    return summarize(turns)


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_signals()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": package_versions(),
        "settings": {**vars(options), "out": Path(options.out).name, "load_average_at_start": load},
        **found,
    }
    write_json_atomic(Path(options.out), result)
    lowest, highest = found["ratio_spread"]
    say(
        f"wrote {options.out}; sync / async: {found['ratio']:.2f} ({lowest:.2f} to {highest:.2f}), with perfect overlap "
        f"{found['limit']:.2f}"
    )


if __name__ == "__main__":
    run_program(main)
