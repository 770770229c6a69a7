"""The fine-tuning benchmark: its arithmetic by hand, its data, and one small run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.finetune import schedule
from benchmarks.report import add_ratios, loss_differences, pool, rates, ratios
from benchmarks.shapes import EOS_ID, SHAPES, ModelSize, as_text, distinct_tokens, flops_per_pair, make_plan
from tests.helpers import REPOSITORY


def test_flops_of_a_pair_worked_by_hand() -> None:
    size = ModelSize(trunk=100, head=10, layers=2, attention_width=4)
    # P 3, C 2, R 1: D = 6, T = 3; keys seen: 5 * 6 / 2 in P + C, 3 of P and 1 of its own by R.
    seen = 15 + 3 + 1
    attention = 4 * 2 * 4 * seen
    assert flops_per_pair(size, (3, 2, 1), epochs=1) == 8 * (100 * 6 + 10 * 3) + 4 * attention
    assert flops_per_pair(size, (3, 2, 1), epochs=2) == 7 * (100 * 6 + 10 * 3) + 3.5 * attention


def test_rates_spread_the_opponents_pass_over_the_epochs() -> None:
    turns = [{"seconds": 2.0, "tokens": 200}, {"seconds": 1.0, "tokens": 50}]
    plain = rates(turns, 10, None, epochs=3)
    assert plain["tokens_per_second"] == [100, 50]
    assert plain["step_pairs_per_second"] == plain["pairs_per_second"] == [10, 5]
    # 0.01 s per token of the steps and 1/3 of 0.03 s per token of the pass: 0.02 s per token, 5 pairs of 10 tokens.
    cached = rates(turns, 10, 100 / 3, epochs=3)
    assert cached["pairs_per_second"] == pytest.approx([5, 10 / 3])


def test_ratios_are_ours_over_the_peers_turn_by_turn() -> None:
    assert ratios([4.0, 6.0, 9.0], [2.0, 2.0, 2.0]) == (3.0, 2.0, 4.5)
    ours, peer = ({"reps": {"pairs_per_second": [speed]}, "peak_bytes": peak} for speed, peak in ((6.0, 2), (2.0, 8)))
    ours["peak_above_baseline_bytes"], peer["peak_above_baseline_bytes"] = 1, 5
    result: dict[str, Any] = {"contenders": {"ours": ours, "naive": peer, "trl_best": {"error": "out of memory"}}}
    add_ratios(result)
    assert result["ratios"] == {"naive": 3.0} and result["ratio_spread"] == {"naive": [3.0, 3.0]}
    assert result["peak_memory_ratio"] == {"naive": 0.25}
    assert result["peak_above_baseline_ratio"] == {"naive": 0.2}


def test_a_paired_run_compares_neighbouring_turns_and_pools_ours() -> None:
    def facts(speeds: list[float], peak: int) -> dict[str, Any]:
        return {
            "label": "x",
            "pairs_per_second": float(np.median(speeds)),
            "reference_tokens_per_second": 4.0,
            "peak_bytes": peak,
            "peak_above_baseline_bytes": peak - 1,
            "processor_share": 1.0,
            "turns": [{}] * len(speeds),
            "reps": {"pairs_per_second": speeds},
        }

    beside_naive, beside_trl = facts([6.0, 8.0], 2), facts([3.0, 3.0], 3)
    naive, trl = facts([2.0, 2.0], 8), facts([1.0, 1.5], 9)
    naive["ours_beside"], trl["ours_beside"] = beside_naive, beside_trl
    ours = pool([beside_naive, beside_trl])
    assert ours["pairs_per_second"] == 4.5 and ours["peak_bytes"] == 3 and len(ours["turns"]) == 4
    result: dict[str, Any] = {"contenders": {"ours": ours, "naive": naive, "trl_best": trl}}
    add_ratios(result)
    assert result["ratios"] == {"naive": 3.5, "trl_best": 2.5}
    assert result["ratio_spread"] == {"naive": [3.0, 4.0], "trl_best": [2.0, 3.0]}
    assert result["peak_memory_ratio"] == {"naive": 0.25, "trl_best": 3 / 9}


def test_the_schedules_say_who_takes_turns_with_whom() -> None:
    def groups(schedule_name: str) -> list[list[str]]:
        return schedule(SimpleNamespace(contenders=["ours", "naive", "trl_best"], schedule=schedule_name))

    assert groups("interleaved") == [["matmul", "ours", "naive", "trl_best"]]
    assert groups("paired") == [["matmul", "ours", "naive"], ["matmul", "ours", "trl_best"]]
    assert groups("sequential") == [["matmul"], ["ours"], ["naive"], ["trl_best"]]


def test_other_work_shows_in_the_losses() -> None:
    def records(after: float, chosen: float) -> list[dict[str, float]]:
        return [
            {"loss": 0.7, "chosen": chosen, "rejected": -50.0},
            {"loss": after, "chosen": chosen, "rejected": -50.0},
        ]

    found = loss_differences({"a": records(0.5, -100.0), "b": records(0.52, -101.0)}, verified=2)
    assert found["a"] == {"logps": 0, "loss": 0}
    assert found["b"] == {"logps": pytest.approx(0.01), "loss": pytest.approx(0.1)}  # 0.02 of a step that took off 0.2


def test_both_kinds_of_batches_begin_alike_and_grouping_groups() -> None:
    plan = make_plan(SHAPES["uc"], batch_size=4, warmup=1, measured=10, vocab_size=100, seed=1)
    head = 3 * 4
    assert plan.shuffled[:4] == plan.shuffled[4:8]
    assert plan.shuffled[:head] == plan.grouped[:head]
    assert len(plan.shuffled) == len(plan.grouped) == head + 10 * 4

    def spread(pairs: list[dict[str, list[int]]]) -> float:
        lengths = [distinct_tokens(pair) for pair in pairs[head:]]
        return float(np.mean([max(some) - min(some) for some in np.reshape(lengths, (-1, 4))]))

    assert spread(plan.grouped) < 0.6 * spread(plan.shuffled)
    for pair in plan.shuffled + plan.grouped:
        longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        assert len(pair["prompt_ids"]) + longest <= SHAPES["uc"].max_length
        assert all(pair[f"{half}_ids"].index(EOS_ID) == len(pair[f"{half}_ids"]) - 1 for half in ("chosen", "rejected"))


def test_text_becomes_the_ids_it_was_written_from() -> None:
    from benchmarks.shapes import make_tokenizer

    ids = [2, 99, 57, EOS_ID]
    assert make_tokenizer(100)(as_text(ids[:2]) + as_text(ids[2:]))["input_ids"] == ids


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(REPOSITORY / "benchmarks" / "finetune.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)


def test_unknown_contender_is_refused_with_the_valid_names(tmp_path: Path) -> None:
    done = run_benchmark("--contenders", "ours", "verl", "--out", tmp_path / "out.json")
    assert done.returncode == 2
    assert "unknown contender 'verl'" in done.stderr and "trl_best_grouped" in done.stderr


@pytest.mark.slow
def test_small_run_from_end_to_end(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    options = (
        "--model",
        "tiny",
        "--batch_size",
        2,
        "--reps",
        1,
        "--warmup",
        0,
        "--precision",
        "fp32",
        "--device",
        "cpu",
    )
    done = run_benchmark(*options, "--contenders", "ours", "naive", "trl_best", "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["ratios"]) == set(result["peak_memory_ratio"]) == {"naive", "trl_best"}
    assert result["verification"]["agree"]
    for facts in result["contenders"].values():
        first, second, third = (record["loss"] for record in facts["records"])
        assert first == pytest.approx(np.log(2), abs=1e-6)
        assert second < first - 1e-4  # the batch that was just learned
        assert third == pytest.approx(result["contenders"]["ours"]["records"][2]["loss"], abs=1e-5)
        assert facts["pairs_per_second"] > 0
        assert facts["peak_bytes"] > facts["baseline_bytes"] > 0
        assert facts["matmul_fraction"] > 0
    naive, best = result["contenders"]["naive"], result["contenders"]["trl_best"]
    assert naive["pairs_per_second"] == pytest.approx(
        naive["step_pairs_per_second"]
    )  # no pass of the opponent before training
    assert best["pairs_per_second"] < best["step_pairs_per_second"]
    assert "TRL, best settings" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
