"""The SFT benchmark: its arithmetic by hand, its data, and one small run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.result_tables import sft_table
from benchmarks.sft_report import loss_differences
from benchmarks.sft_shapes import draw_lengths, flops_per_row, make_sft_plan, padded_to_distinct
from benchmarks.shapes import EOS_ID, ModelSize
from tests.helpers import REPOSITORY


def test_flops_of_a_row_worked_by_hand() -> None:
    size = ModelSize(trunk=100, head=10, layers=2, attention_width=4)
    # 5 tokens, 2 of them in the response; 15 keys are seen.
    row = {"prompt_ids": [1, 2, 3], "response_ids": [4, 5]}
    assert flops_per_row(size, [row, row]) == 6 * (100 * 5 + 10 * 2) + 3 * 4 * 2 * 4 * 15


def test_padding_by_hand() -> None:
    assert padded_to_distinct([1, 3, 2, 2], batch_size=2) == (6 + 4) / 8


def test_lengths_are_those_of_instruction_data() -> None:
    lengths = draw_lengths(8 * 400, np.random.default_rng(1))
    assert np.median(lengths, axis=0) == pytest.approx([45, 107], rel=0.1)
    assert padded_to_distinct(lengths.sum(axis=1).tolist(), 8) == pytest.approx(2.2, abs=0.15)


def test_both_kinds_of_batches_begin_alike_and_grouping_groups() -> None:
    plan = make_sft_plan(batch_size=4, warmup=1, measured=10, vocab_size=100, seed=1)
    assert plan.head == 3 * 4 and plan.shuffled[:12] == plan.grouped[:12] and plan.shuffled[:4] == plan.shuffled[4:8]
    padded = [
        padded_to_distinct([len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows[plan.head :]], 4)
        for rows in (plan.shuffled, plan.grouped)
    ]
    assert padded[1] < 0.8 * padded[0] and len(plan.shuffled) == len(plan.grouped)
    assert all(row["response_ids"].index(EOS_ID) == len(row["response_ids"]) - 1 for row in plan.shuffled)


def test_other_work_shows_in_the_losses() -> None:
    records = {"a": [{"loss": 4.0}, {"loss": 3.0}], "b": [{"loss": 4.4}, {"loss": 3.2}]}
    found = loss_differences(records, verified=2)
    assert found["a"] == {"loss": 0, "gain": 0}
    assert found["b"] == {"loss": pytest.approx(0.1), "gain": pytest.approx(0.2)}


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "sft.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600)


def test_unknown_contender_is_refused_with_the_valid_names(tmp_path: Path) -> None:
    done = run_benchmark("--contenders", "ours", "verl", "--out", tmp_path / "out.json")
    assert done.returncode == 2 and "unknown contender 'verl'" in done.stderr and "trl_padding_free" in done.stderr


@pytest.mark.slow
def test_small_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", "tiny", "--batch_size", 2, "--reps", 1, "--warmup", 0, "--precision", "fp32")
    peers = ("trl_best", "trl_padding_free")
    done = run_benchmark(
        *options, "--schedule", "interleaved", "--contenders", "ours", *peers, "--out", tmp_path / "o.json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["verification"]["agree"] and set(result["ratios"]) == set(peers)
    for facts in result["contenders"].values():
        assert facts["tokens_per_second"] > 0 and facts["matmul_fraction"] > 0
        assert facts["peak_bytes"] > facts["baseline_bytes"] > 0
    monkeypatch.setattr("benchmarks.result_tables.RESULTS", tmp_path)
    assert len(sft_table("o").splitlines()) == 2 + 3 and "TRL, activations kept" in sft_table("o")
