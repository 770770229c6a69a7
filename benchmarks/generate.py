"""Compares our generation on vLLM with the engine alone, and our transformers backend with the original's loop, turn by turn.

Then it measures everything around the model, in generation and gathering, at scale: with a backend that answers immediately.

    python benchmarks/generate.py --out results.json --plot results.png
    python benchmarks/generate.py --model models/SmolLM2-135M-Instruct --questions test.jsonl --gather_rows 0 --out results.json

With ``--model`` the prompts are questions for a chat model, and each contender is compared with the limit of the machine.
Writes one JSON file: machine, versions, settings, contenders (medians and repetitions), vllm_vs_bare, transformers_vs_vllm,
transformers_vs_original, limit, ratio_spread, vllm_same_responses, scale, generate_rows_per_s, gather_rows_per_s, their memory
growth, goals. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.finetune import CLOCKS, cpu_name, say
from benchmarks.generation_contenders import CONTENDERS
from benchmarks.generation_data import (
    MAX_NEW_TOKENS,
    PROMPT_TOKENS,
    make_prompts,
    read_prompts,
    read_questions,
    save_model,
    save_prompts,
    save_texts,
)
from benchmarks.generation_limit import add_limit
from benchmarks.generation_process import Seat, Task
from benchmarks.generation_report import add_goals, add_ratios, add_scale, plot, same_responses, summarize, table
from benchmarks.generation_scale import FRACTION_ROWS, measure_scale
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.files import atomic_file, write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program
from spin.alignment.core.provenance import package_versions

SAME_RESPONSES = 0.95  # below this, the two uses of vLLM have not done the same work


def make_parser() -> Parser:
    parser = Parser(prog="generate.py", description="Speed of generation against its peers, and its memory at scale.")
    add = parser.add_argument
    add("--contenders", nargs="*", default=list(CONTENDERS), help=f"any of {', '.join(CONTENDERS)}")
    add("--prompts", type=int, default=256, help="prompts of a turn")
    add("--model", default=None, help="folder of a chat model (default: a random model of 4.3M parameters)")
    add("--questions", default=None, help="with --model: JSON lines file with the key question")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of all contenders")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest response in tokens")
    add("--reps", type=int, default=3, help="measured turns of each contender")
    add("--clock", default="wall", choices=tuple(CLOCKS), help="processor: time on the CPU, engine included")
    add("--gather_rows", type=int, default=1_000_000, help="rows to generate and gather without a model (0: none)")
    add("--threads", type=int, default=1, help="CPU threads of a contender")
    add("--allocator", default="tuned", choices=("stock", "tuned"), help="tuned: glibc keeps freed memory (CPU)")
    add("--seed", type=int, default=0, help="seed of weights, prompts and responses")
    add("--out", required=True, help="JSON file to write")
    add("--plot", default=None, help="PNG file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before anything is loaded.

    Raises:
        InputError: a flag is out of range, or a contender is unknown or named twice.
    """
    for name, lowest in (("prompts", 1), ("reps", 1), ("threads", 1), ("seed", 0), ("max_new_tokens", 1)):
        if getattr(options, name) < lowest:
            raise InputError(f"{name} is {getattr(options, name)}: set it to {lowest} or more")
    if options.gather_rows and options.gather_rows < 10:
        raise InputError(f"gather_rows is {options.gather_rows}: set it to 0 (none) or to 10 or more")
    if (options.model is None) != (options.questions is None):
        raise InputError("model and questions require each other: give both or neither")
    if options.model is not None and options.gather_rows:
        raise InputError("the test at scale has no model: with --model, set gather_rows to 0")
    for name in options.contenders:
        lookup(CONTENDERS, name, "contender")
    if len(set(options.contenders)) < len(options.contenders):
        raise InputError("contenders names one twice: name each once")
    if not options.contenders and not options.gather_rows:
        raise InputError("there is nothing to measure: name a contender or set gather_rows above 0")


def save_turns(options: Any, folder: Path) -> int:
    """Write the prompts of every turn; return the longest prompt in tokens."""
    turns = options.reps + 1
    if options.model is None:
        for turn in range(turns):
            save_prompts(folder / f"turn-{turn}", make_prompts(options.prompts, turn, options.seed))
        return PROMPT_TOKENS[1]
    from spin.alignment.data.chat_encoder import load_encoder

    questions = read_questions(Path(options.questions), options.prompts * turns)
    for turn in range(turns):
        some = questions[turn * options.prompts :][: options.prompts]
        save_texts(folder / f"turn-{turn}", {f"turn{turn}-{number}": text for number, text in enumerate(some)})
    encoder = load_encoder(options.model)
    lengths = [len(one.token_ids) for turn in range(turns) for one in read_prompts(folder / f"turn-{turn}", encoder)]
    return max(lengths)


def take_turns(options: Any, folder: Path, model_folder: Path) -> dict[str, Seat]:
    """Let all contenders take their turns on the same prompts, in an order that reverses every time; the first turn warms up."""
    longest = save_turns(options, folder / "data")
    shared = {
        name: getattr(options, name)
        for name in ("prompts", "reps", "seed", "threads", "allocator", "dtype", "max_new_tokens")
    }
    shared["max_model_len"] = longest + options.max_new_tokens
    places = (str(model_folder), str(folder / "data"))
    seats = {name: Seat(Task(name, str(folder / name), *places, **shared)) for name in options.contenders}
    try:
        for name, seat in seats.items():
            say(f"starting {name}")
            seat.start()
        for turn in range(options.reps + 1):
            for seat in seats.values() if turn % 2 else reversed(seats.values()):
                seat.take_turn()
            say(f"turn {turn} of {options.reps} is complete")
    finally:
        for seat in seats.values():
            seat.close()
    for name, seat in seats.items():
        if seat.error:
            say(f"{name} failed: {seat.error}")
    return seats


def measure_at_scale(options: Any, folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    """Measure generation and gathering of a tenth of the rows, then of all rows."""
    found = {}
    for rows in (options.gather_rows // 10, options.gather_rows) if options.gather_rows else ():
        say(f"generating and gathering {rows:,} rows without a model")
        found[rows] = measure_scale(rows, folder / "model", folder / f"scale-{rows}", options.threads)
    return found


def count_parameters(folder: Path) -> int:
    """Return the number of weights stored in a model folder."""
    from spin.alignment.models.weights_check import stored_weights

    return sum(weight.numel() for weight in stored_weights(folder).values())


def describe(options: Any, parameters: int) -> dict[str, Any]:
    """Return machine, versions and settings of the run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "plot", "questions")}
    settings["model"] = Path(options.model).name if options.model else None
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()},
        "versions": {"python": platform.python_version()} | package_versions(),
        "settings": settings | {"parameters": parameters, "frac_len": FRACTION_ROWS},
    }


def add_contenders(result: dict[str, Any], seats: dict[str, Seat], clock: str) -> None:
    """Add ``contenders`` and the results derived from them, without the first turn."""
    result["contenders"] = {
        name: {"label": CONTENDERS[name].label, "error": seat.error}
        if seat.error
        else summarize(CONTENDERS[name].label, seat.turns[1:], CLOCKS[clock])
        | {"start_seconds": seat.facts["start_seconds"]}
        for name, seat in seats.items()
    }
    add_ratios(result)
    if "vllm_vs_bare" in result:
        result["vllm_same_responses"] = same_responses(seats["vllm"].turns[1:], seats["bare_vllm"].turns[1:])


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_signals()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model" if options.model is None else Path(options.model)
        parameters = save_model(model, options.seed) if options.model is None else count_parameters(model)
        result = describe(options, parameters)
        seats = take_turns(options, folder, model) if options.contenders else {}
        add_contenders(result, seats, options.clock)
        if options.model is not None:
            add_limit(result, seats, model, options.dtype, options.threads, CLOCKS[options.clock])
        add_scale(result, measure_at_scale(options, folder))
    add_goals(result)
    write_json_atomic(Path(options.out), result)
    print(table(result))
    if options.plot:
        with atomic_file(Path(options.plot)) as file:
            file.write(plot(result))
    return conclude(result)


def conclude(result: dict[str, Any]) -> int:
    """Print what the reader must know about the run; return the exit code: 1 if its numbers are not comparable."""
    for name, facts in result["goals"].items():
        if not facts["met"]:
            print(f"goal not met: {name} is {facts['reached']:.4g}, goal {facts['goal']:g}")
    failed = any("error" in facts for facts in result["contenders"].values())
    if result.get("vllm_same_responses", 1.0) < SAME_RESPONSES:
        print("the two uses of vLLM gave different responses: their rates do not compare")
        failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    run_program(main)
