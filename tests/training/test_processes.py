"""One, two and three real processes (gloo) with rows that do not divide: the same steps, weights and held-out metrics."""

from __future__ import annotations

import json
import sys

import pytest

from spin.alignment.training.filler_rows import FilledBatches, FillerRow, RowsWithFillers
from tests.helpers import run_command
from tests.helpers.in_processes import RUNS


@pytest.fixture(scope="module")
def records(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    done = run_command([sys.executable, "-m", "tests.helpers.in_processes", tiny_model, folder], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        kind: [json.loads((folder / f"{kind}-{run[0]}-{run[3]}.json").read_text()) for run in runs]
        for kind, runs in RUNS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_several_processes_count_every_row_once(records, kind):
    alone, *several = records[kind]
    measures = {"pairs": "eval_rewards/margins", "sft": "eval_loss", "online": "eval_t1_score"}
    assert (
        len(alone["steps"]) == 2 and measures[kind] in alone["held_out"]
    )  # 7 rows in steps of 6: the last one has one row
    for found in several:
        assert found["held_out"] == pytest.approx(alone["held_out"], rel=2e-5, abs=2e-6)
        for step, expected in zip(found["steps"], alone["steps"], strict=True):
            assert step == pytest.approx(expected, rel=2e-5, abs=2e-6)
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-5)


class Batches:
    sampler = object()

    def __init__(self, batches, batch_size):
        self.batches, self.batch_size = batches, batch_size

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_fillers_complete_the_last_batch_and_the_last_round():
    filled = FilledBatches(Batches([[4, 2], [0, 3], [1]], 2), multiple=2)
    assert list(filled) == [[4, 2], [0, 3], [1, ~1], [~1, ~1]] and len(filled) == 4
    whole = FilledBatches(Batches([[0, 1], [2, 3]], 2), multiple=2)
    assert list(whole) == [[0, 1], [2, 3]]
    rows = RowsWithFillers(["a", "b", "c"])
    assert [rows[index] for index in (0, 2, ~2, ~0)] == ["a", "c", FillerRow("c"), FillerRow("a")]
