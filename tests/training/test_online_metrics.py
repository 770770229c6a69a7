"""What is logged about an online training: KL, entropy, staleness, pass@k, best-of-n, and the stored responses."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from spin.alignment.methods.losses import LOSSES, LossInputs
from spin.alignment.training.metrics import PairMetrics
from spin.alignment.training.online.kept_responses import keep_responses, response_rows
from spin.alignment.training.online.labels import StepCounts
from spin.alignment.training.online.pass_rates import held_out_sums, ks_of, pass_at, pass_log, pass_names
from spin.alignment.training.online.step_log import training_log

ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor)


@pytest.mark.parametrize(("samples", "passed"), [(4, 0), (4, 1), (4, 2), (4, 4), (6, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples, passed):
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(range(samples), k))
        share = sum(min(subset) < passed for subset in subsets) / len(subsets)
        assert pass_at(k, samples, passed) == pytest.approx(share, abs=1e-12)


def test_held_out_means_are_over_prompts_with_all_scores():
    assert [ks_of(n) for n in (1, 2, 3, 4, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]
    scores = [[0.0, 1.0, 0.5], [0.25, 0.0, 0.5], [1.0, None, 1.0], [1.0, 1.0, 0.0]]
    log = pass_log(held_out_sums(scores, 3, 1.0), 3, "eval_t1")
    assert list(log) == [f"eval_t1_{name}" for name in pass_names(3)]
    assert log == pytest.approx(
        {
            "eval_t1_best_of_3": (1.0 + 0.5 + 1.0) / 3,
            "eval_t1_pass_at_1": (1 / 3 + 0 + 2 / 3) / 3,
            "eval_t1_pass_at_2": (2 / 3 + 0 + 1) / 3,
            "eval_t1_pass_at_3": 2 / 3,
        }
    )
    assert pass_log(held_out_sums([[None] * 3], 3, 1.0), 3, "x") == {}


def test_kl_is_estimated_per_token_of_the_policys_own_responses():
    """Two pairs; tokens with log(reference / policy) = d count exp(d) - 1 - d, padding not at all."""
    policy = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, 0.0], [-0.5, -0.5]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]], dtype=torch.bool)
    differences = torch.tensor([[0.5, -0.25], [1.0, 0.0], [-2.0, 0.0], [0.0, 0.125]])
    inputs = LossInputs(policy, policy + differences, mask)

    def kl(sampled):
        metrics = PairMetrics(LOSSES["sigmoid"], sampled)
        outputs = LOSSES["sigmoid"](inputs)
        metrics.add(inputs, outputs, outputs.losses)
        return metrics.take(ALONE).values.get("kl")

    terms = [[math.expm1(d) - d for d in row] for row in ((0.5, -0.25), (1.0,), (-2.0,), (0.0, 0.125))]
    assert kl(("chosen", "rejected")) == pytest.approx(sum(map(sum, terms)) / 6, rel=1e-6)
    assert kl(("rejected",)) == pytest.approx(sum(map(sum, terms[2:])) / 3, rel=1e-6)
    assert kl(()) is None


def test_entropy_and_staleness_are_means():
    counts = StepCounts(responses=2, prompts=1, tokens=5, updates=4, lag=0 + 1 + 2 + 3)
    counts.add_logps(
        [SimpleNamespace(logprobs=[-1.0, -2.0]), SimpleNamespace(logprobs=[-0.5]), SimpleNamespace(logprobs=None)]
    )
    total = {**vars(counts), **{f"{name}_seconds": 0.0 for name in ("generate", "label", "reference", "update")}}
    log = training_log(total)
    assert (log["entropy"], log["staleness"]) == (pytest.approx(3.5 / 3), 1.5)
    assert (
        "entropy" not in training_log(total | {"logp_tokens": 0})
        and training_log(total | {"updates": 0, "lag": 0})["staleness"] == 0
    )


def stored(prompt="p1"):
    turns = [{"role": "user", "content": "say"}]
    rows = [
        {
            "prompt_id": prompt,
            "sample_index": sample,
            "rejected": [*turns, {"role": "assistant", "content": f"r{sample}"}],
            "rejected_token_ids": [5 + sample, 2],
            "rejected_finish_reason": "stop",
            "rejected_score": float(sample),
            "weights_version": "version 7",
        }
        for sample in range(3)
    ]
    pair = {"chosen_token_ids": [7, 2], "rejected_token_ids": [5, 2]}
    return response_rows(rows, [pair], [[-1.0, -2.0], None, [-0.5, -0.5]])


def test_the_responses_of_the_newest_steps_are_stored(tmp_path):
    for step in range(8, 13):
        keep_responses(tmp_path, step, stored(), most_steps=3)
    folder = tmp_path / "responses"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000{step}.parquet" for step in (10, 11, 12)]
    keep_responses(tmp_path, 12, stored("again"), most_steps=3)  # repeated after a resume
    rows = pq.read_table(folder / "step-000012.parquet").to_pylist()
    assert [row["prompt_id"] for row in rows] == ["again"] * 3 and {row["step"] for row in rows} == {12}
    assert [row["weights_version"] for row in rows] == ["version 7"] * 3
    told = ("response", "score", "chosen", "rejected", "tokens", "finish_reason", "logp_per_token")
    assert [tuple(row[name] for name in told) for row in rows] == [
        ("r0", 0.0, False, True, 2, "stop", -1.5),
        ("r1", 1.0, False, False, 2, "stop", None),
        ("r2", 2.0, True, False, 2, "stop", -0.5),
    ]
    keep_responses(tmp_path / "none", 1, [], most_steps=3)
    assert not (tmp_path / "none").exists()
