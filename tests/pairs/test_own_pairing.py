"""convert_data.py with a pairing of the user's own, by ``module:function``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import hash_file, read_provenance
from spin.alignment.methods.losses import LOSSES
from spin.alignment.training.preference_data import check_preference
from tests.helpers.gathering import gather, refusal, write_whole

OWN = """
from spin.alignment.methods.pairings.base import Pairing

def _alone(rows):
    return [row | {"chosen_effort": 1.0, "rejected_effort": 0.5} for row in rows[:1]]

alone = Pairing(_alone, labels=("effort",), prefers=False)

def unknown(rows):
    return [row | {"mood": 1} for row in rows]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_pairing", None)
    path = tmp_path / "own_pairing.py"
    path.write_text(OWN)
    return path


def test_its_labels_are_columns_and_its_file_is_in_the_provenance(module, tmp_path):
    generated = write_whole(tmp_path / "in", num_samples=2)
    code, _, errors = gather(generated, tmp_path / "out", "--pairing", "own_pairing:alone")
    assert code == 0, errors
    (file,) = (tmp_path / "out").glob("*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert [(row["chosen_effort"], row["rejected_effort"]) for row in rows] == [(1.0, 0.5)] * 6
    extra = read_provenance(open_parquet(file).schema_arrow, file).extra
    assert extra["pairing_module_own_pairing"] == hash_file(module) and extra["prefers"] is False
    module.write_text(OWN + "# changed\n")
    code, _, errors = gather(generated, tmp_path / "out", "--pairing", "own_pairing:alone")
    assert code == 2 and "pairing_module_own_pairing" in errors


def test_pairs_that_prefer_nothing_are_kept_from_losses_that_compare(module, tmp_path):
    assert gather(write_whole(tmp_path / "in"), tmp_path / "out", "--pairing", "own_pairing:alone")[0] == 0
    data = SimpleNamespace(dataset_mixer={str(tmp_path / "out"): 1.0}, dataset_splits=["train_prefs"])

    def settings(name):
        return SimpleNamespace(data=data, arguments=SimpleNamespace(loss_type=name, loss=LOSSES[name]))

    check_preference(settings("sppo_reward"))
    with pytest.raises(
        InputError, match=r"prefer no response .pairing own_pairing:alone., but loss_type sigmoid compares"
    ):
        check_preference(settings("sigmoid"))


def test_names_that_lead_nowhere_are_refused(module, tmp_path):
    generated = write_whole(tmp_path / "in")
    assert "module own_pairing has no alon" in refusal(generated, tmp_path / "out", "--pairing", "own_pairing:alon")
    assert "unknown pairing 'ground_truht'" in refusal(generated, tmp_path / "out", "--pairing", "ground_truht")
    assert "returns the columns mood, which" in refusal(generated, tmp_path / "out", "--pairing", "own_pairing:unknown")
    sentence = refusal(generated, tmp_path / "out", "--pairing", "own_pairing:alone", "--scorer", "length_penalty")
    assert "pairing own_pairing:alone reads no scores" in sentence
