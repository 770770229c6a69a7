"""Many processes that generate into one folder at the same time, some of them killed.

The files must equal those of one process that nobody disturbs, with every response there once. The responses come from a backend
that needs no model's computations (``tests/helpers/generate_with_fake.py``), so that 64 processes fit on a small machine.
``python -m tests.faults.many_writers JSON`` prints one JSON line per fault.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.faults.forks import in_fork, print_reports
from tests.faults.programs import contents, differing
from tests.helpers import save_tiny_model
from tests.helpers.generate_in_processes import start, storm
from tests.helpers.runs import write_sums

SAMPLES = 2
PROMPTS_EACH = 6
# Long enough for all of the kills to come while there is work to do.
PROMPT_SECONDS = 2.0


def reports(part: str, plan: Mapping[str, Any], root: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a report of the kills and one of the folder; a fraction of six prompts for each process."""
    processes, folder = plan["processes"], root / part
    prompts = PROMPTS_EACH * processes
    yield {"how": "undisturbed", "planned": plan["kills"], "wrong": []}

    def make_inputs() -> None:
        save_tiny_model(folder / "model")
        write_sums(folder / "sums", num_train=prompts, num_test=1)

    assert in_fork(make_inputs) == 0
    undisturbed, shared = folder / "undisturbed", folder / "shared"
    assert os.waitstatus_to_exitcode(os.waitpid(start(arguments(folder, undisturbed, prompts)), 0)[1]) == 0
    said = folder / "said.txt"
    os.environ.update(FAKE_DELAY=str(PROMPT_SECONDS), FAKE_OUTPUT=str(said))
    outcome = storm(arguments(folder, shared, prompts), processes, plan["kills"], seed)
    codes = Counter(outcome["codes"])
    wrong = [] if set(codes) == {0} else [f"exit codes: {dict(codes)}: {errors(said)}"]
    if outcome["kills"] < plan["kills"]:
        wrong.append(f"the work was done after {outcome['kills']} kills")
    yield {"how": "kill", "count": outcome["kills"], "processes": processes, "wrong": wrong}
    yield {"how": "finished", "wrong": wrong_rows(shared, undisturbed, prompts)}


def errors(said: Path) -> str:
    """Return the first traceback or error that a process reported."""
    text = said.read_text(errors="replace")
    places = [place for word in ("Traceback", "error: ") if (place := text.find(word)) >= 0]
    return text[min(places, default=0) :][:3000]


def arguments(folder: Path, output: Path, prompts: int) -> list[str]:
    flags = {
        "model": folder / "model",
        "input_dir": folder / "sums" / "train.jsonl",
        "output_dir": output,
        "backend": "fake",
        "num_samples": SAMPLES,
        "max_new_tokens": 12,
        "frac_len": PROMPTS_EACH,
        "data_frac": "auto",
        "flush_every": 4,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def wrong_rows(shared: Path, undisturbed: Path, prompts: int) -> list[str]:
    """Return what is wrong with the folder that many wrote: files that differ, rows missing or repeated, working files left."""
    names = differing(contents(shared), contents(undisturbed))
    wrong = [f"not equal: {', '.join(names[:8])}"] if names else []
    found: Counter[tuple[str, int]] = Counter()
    for path in sorted(shared.glob("*.parquet")):
        table = pq.read_table(path, columns=["prompt_id", "sample_index"])
        found.update(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))
    if len(found) != prompts * SAMPLES or set(found.values()) != {1}:
        repeated = [row for row, count in found.items() if count > 1]
        wrong.append(f"{len(found)} responses, not {prompts * SAMPLES}; repeated: {repeated[:8]}")
    return wrong


if __name__ == "__main__":
    print_reports(reports)
