"""The responses on the page: texts once, nulls for what is missing, a budget; and lengths as histograms."""

from __future__ import annotations

from spin.alignment.evaluation.responses import HeldOutResponses, read_responses
from spin.alignment.report.curves import length_histograms, response_lengths, training_curves
from spin.alignment.report.samples import all_samples
from tests.helpers.evaluations import write_evaluation


def row(name: str, response: str, score: float | None = 1.0, reason: str = "stop"):
    facts = {"prompt": f"prompt {name}", "ground_truth": "4", "finish_reason": reason}
    return {"prompt_id": name, "response": response, "score": score, **facts}


def responses(**rows):
    return HeldOutResponses({"0": {name: row(name, *facts) for name, facts in rows.items()}})


LENGTHS = {"0": {"a": 3, "b": 5}}


def test_texts_are_stored_once():
    found = all_samples(
        {"sft": responses(a=("4", 1.0), b=("é", None, "length")), "iter0": responses(a=("4", 0.33333333))},
        {"sft": LENGTHS, "iter0": LENGTHS},
    )
    assert found["texts"] == ["prompt a", "4", "prompt b", "é"] and found["total"] == 2
    assert found["prompts"] == [["a", 0, 1], ["b", 2, 1]]
    assert found["answers"] == {"0": {"sft": [[1, 1.0, 3, 0], [3, None, 5, 1]], "iter0": [[1, 0.3333, 3, 0], None]}}


def test_a_prompt_may_have_no_ground_truth():
    found = HeldOutResponses({"0": {"a": row("a", "4") | {"ground_truth": None}}})
    assert all_samples({"sft": found}, {"sft": LENGTHS})["prompts"] == [["a", 0, None]]


def test_a_page_takes_only_so_many_texts():
    both = responses(a=("x" * 50,), b=("y" * 50,))
    found = all_samples({"sft": both}, {"sft": LENGTHS}, budget=40)
    assert [name for name, *_ in found["prompts"]] == ["a"] and found["total"] == 2
    assert len(all_samples({"sft": both}, {"sft": LENGTHS}, budget=400)["prompts"]) == 2


def test_lengths_are_read_and_binned(tmp_path):
    write_evaluation(tmp_path, {0.0: [1.0] * 4, 0.5: [1.0] * 4}, [1.0] * 4, [4] * 4)
    path = tmp_path / "eval.parquet"
    assert response_lengths(path) == {t: {f"p{n}": 10 for n in range(4)} for t in ("0", "0.5")}
    assert set(read_responses(path).by_temperature) == {"0", "0.5"}
    found = length_histograms({"sft": LENGTHS, "iter0": {"0": {"a": 99}}}, ["0"])
    edges, shares = found["0"]["edges"], found["0"]["models"]
    assert edges[:3] == [0, 3, 6] and edges[-1] >= 100 and len(edges) == len(shares["sft"]) + 1
    assert shares["sft"][1] == 1.0 and shares["iter0"][33] == 1.0 and sum(shares["iter0"]) == 1.0


def test_curves_of_sft_are_apart():
    log = [{"step": 1, "loss": 2.0, "total_flos": 1}, {"step": 2, "loss": float("nan")}, {"step": 2, "train_loss": 1.0}]
    play = [{"step": 1, "loss": 0.7, "rewards/margins": 0.1, "rewards/margins_se": 0.01, "other": 1}]
    found = training_curves({"sft": {"history": log}, "iter0": {"history": play}, "bare": {}})
    assert found["models"]["sft"] == {"sft:loss": [[1], [2.0]]} and "bare" not in found["models"]
    assert list(found["titles"].items()) == [
        *(("loss", "Loss"), ("rewards/margins", "Margin (nats, times beta)")),
        *(("sft:loss", "SFT: loss"), ("other", "other")),
    ]
