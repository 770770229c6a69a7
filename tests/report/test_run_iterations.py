"""scripts/run_iterations.sh evaluates the start and every iteration into the layout that the report reads, each once."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.helpers import REPOSITORY

# Stands for python: notes the command, and writes what evaluate_model.py and run_spin.py would.
STUB = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
while [ $# -gt 0 ]; do
    case "$1" in
        --output_file) mkdir -p "$(dirname "$2")" && : > "$2" ;;
        --output_dir=*) folder=${1#*=} && folder=${folder//\\'/} && mkdir -p "$folder" && : > "$folder/metrics.json" ;;
    esac
    shift
done
"""


@pytest.fixture
def run(tmp_path):
    """Run the script for two iterations; return the programs that were started, with the models that were evaluated."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)

    def start(**variables: str) -> list[str]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
            "LOG": str(log),
            "MODEL": "start",
            "INPUT_DIR": "prompts",
        }
        environment |= {"RUN_DIR": str(tmp_path / "run"), "LAUNCH_CONFIG": "none", "EVALUATE": "--limit 7", **variables}
        script = REPOSITORY / "scripts" / "run_iterations.sh"
        done = subprocess.run(["bash", script, "2"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [_what(line) for line in log.read_text().splitlines()]

    return start


def _what(command: str) -> str:
    if "evaluate_model.py" not in command:
        return re.findall(r"(\w+)\.py|spin (report)", command)[0][0] or "report"
    model, split, file = re.findall(r"--model (\S+) .*--split (\S+) --output_file (\S+) --limit 7", command)[0]
    return f"evaluate {'/'.join(model.split('/')[-2:])} [{split}] into {'/'.join(file.split('/')[-2:])}"


def test_every_model_is_evaluated_once(run):
    assert run() == [
        "evaluate start [test] into sft/eval.json",
        *("generate", "convert_data", "run_spin", "evaluate iter0/checkpoint [test] into iter0/eval.json"),
        *("generate", "convert_data", "run_spin", "evaluate iter1/checkpoint [test] into iter1/eval.json"),
        "report",
    ]
    # The stub trains again, so the models are newer than their scores; the start is not.
    assert [line for line in run() if "sft" in line] == []


def test_evaluations_can_be_left_out(run):
    assert run(TEST_SPLIT="none") == [*("generate", "convert_data", "run_spin") * 2, "report"]
    assert run(TEST_SPLIT="held_out")[0] == "evaluate start [held_out] into sft/eval.json"
