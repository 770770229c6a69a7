"""Warnings at and beyond their thresholds, and what win rates and benchmarks add to verdicts, headline and table."""

from __future__ import annotations

import pytest

from spin.alignment.evaluation.responses import read_responses
from spin.alignment.report.headline import headline
from spin.alignment.report.summary import evaluation_row
from spin.alignment.report.table import cells
from spin.alignment.report.verdicts import win_verdicts
from spin.alignment.report.warnings import warnings
from spin.alignment.report.win_columns import add_win_rates
from tests.helpers.evaluations import share, write_evaluation

START = {
    "model": "sft",
    "role": "start",
    "iteration": None,
    "mean_length": 10.0,
    "distinct_2": 0.5,
    "repetition_rate": 0.1,
}
GAIN = {"against_start": {"sampled_exact": {"difference": 0.1, "p_value": 0.01}}}


def policy(iteration=0, **facts):
    return {"model": f"iter{iteration}", "role": "policy", "iteration": iteration, **facts}


@pytest.mark.parametrize(
    ("quiet", "loud", "sentence"),
    [
        ({"repetition_rate": 0.14}, {"repetition_rate": 0.16}, "repeated 4-grams rose from 10.0% to 16.0%"),
        ({"distinct_2": 0.41}, {"distinct_2": 0.39}, "distinct-2 is 0.390, SFT's at least 0.500"),
        ({"mean_length": 11.9}, {"mean_length": 12.1}, "mean length moved from 10.0 to 12.1"),
        ({"tie_rate": 0.5}, {"tie_rate": 0.6}, "60% of the comparisons with SFT are ties"),
        ({"win_rate": 0.6, "lc_win_rate": 0.51}, {"win_rate": 0.6, "lc_win_rate": 0.48}, "60.0% against SFT is 48.0%"),
        (GAIN, GAIN | {"lc_win_rate": 0.3, "lc_win_rate_interval": [0.2, 0.4]}, "it wins only 30.0%"),
        (
            {"repetition_rate": 0.1} | GAIN,
            {"repetition_rate": 0.2} | GAIN,
            "it repeats itself more: read some responses",
        ),
        ({"mean_length": 11.0} | GAIN, {"mean_length": 13.0} | GAIN, "its responses became 30% longer"),
    ],
)
def test_thresholds(quiet, loud, sentence):
    assert warnings([START, policy(**quiet)]) == []
    assert sentence in "\n".join(warnings([START, policy(**loud)]))


def test_kl_is_compared_with_the_iteration_before():
    first = policy(rejected_drift=-5.0)
    assert warnings([START, first]) == [] and warnings([START, first, policy(1, rejected_drift=-9.9)]) == []
    assert (
        "grew from 5.0 to 11.0 nats per response since iter0"
        in warnings([START, first, policy(1, rejected_drift=-11.0)])[0]
    )
    small = policy(rejected_drift=-0.5)
    assert warnings([START, small, policy(1, rejected_drift=-1.9)]) == []  # too small to matter


TASK = {"metric": "acc", "shots": 5, "value_se": 0.01, "n": 900}


def test_benchmarks_are_in_table_verdicts_and_headline(tmp_path):
    rows, responses = [], {}
    for name, value, role, number in (("sft", 0.6, "start", None), ("iter0", 0.5, "policy", 0)):
        write_evaluation(tmp_path / name, {1.0: share(100, 30 if role == "start" else 60)}, [1.0] * 100, [4] * 100)
        row = {"model": name, "role": role, "iteration": number, "folder": name, "n": 100}
        row |= evaluation_row(
            {
                "metric": "exact_match",
                "n": 100,
                "temperatures": {"1": {"exact": 0.3}},
                "tasks": {"mmlu": TASK | {"value": value}},
            }
        )
        rows.append(row)
        responses[name] = read_responses(tmp_path / name / "eval.parquet")
    assert rows[1]["task/mmlu"] == 0.5 and rows[1]["task/mmlu_se"] == 0.01
    headings, table = cells({"rows": rows})
    assert table[1][headings.index("mmlu")] == "0.5000"
    # 1.96 * sqrt(2) * 0.01
    assert "mmlu (5-shot) 0.6000 -> 0.5000, difference -0.1000 ± 0.0277 (worse)" in win_verdicts(rows)[0]
    assert "iter0 is worse than the SFT start in mmlu: -0.1000 ± 0.0277" in headline(rows, responses)["caveats"]


def test_graded_scores_give_win_rates_and_exact_ones_do_not(tmp_path):
    rows, responses = [], {}
    for name, role, number, scores in (
        ("sft", "start", None, [0.1] * 10), ("iter0", "policy", 0, [0.3] * 8 + [0.1, 0.0]), ("iter1", "policy", 1, [0.3] * 10)
    ):  # fmt: skip
        write_evaluation(tmp_path / name, {1.0: scores}, [1.0] * 10, [4] * 10)
        facts = {"metric": "m", "sampled_exact": sum(scores) / 10, "n": 10}
        rows.append({"model": name, "role": role, "iteration": number, "folder": name, **facts})
        responses[name] = read_responses(tmp_path / name / "eval.parquet")
    add_win_rates(rows, responses)
    assert "win_rates" not in rows[0] and rows[1]["win_rate"] == 0.85 and rows[1]["win_rates"]["sft"]["wins"] == 8
    assert rows[2]["win_rates"]["iter0"]["win_rate"] == 0.6 and rows[2]["win_rate"] == 1.0
    assert "iter1 against iter0: wins 60.0%" in "\n".join(win_verdicts(rows))
    assert "it wins 100.0% ± " in headline(rows, responses)["sentence"]
    heads = cells({"rows": rows})[0]
    assert heads.index("LC wins") == heads.index("wins") + 1
    exact = [
        {"model": n, "role": r, "iteration": None, "folder": n, "metric": "m"}
        for n, r in (("a", "start"), ("b", "control"))
    ]
    for name in "ab":
        write_evaluation(tmp_path / name, {1.0: share(10, 5)}, [1.0] * 10, [4] * 10)
    add_win_rates(exact, {name: read_responses(tmp_path / name / "eval.parquet") for name in "ab"})
    assert "win_rates" not in exact[1]


def test_a_model_that_only_becomes_surer_loses_no_vocabulary():
    start = START | {"greedy_distinct_2": 0.3}  # what it says without sampling's odd tokens
    assert not [line for line in warnings([start, policy(distinct_2=0.25)]) if "distinct" in line]
    (line,) = [line for line in warnings([start, policy(distinct_2=0.23)]) if "distinct" in line]
    assert "distinct-2 is 0.230, SFT's at least 0.300" in line
