"""A loss of a user's own file with a label that the project has never heard of, and T-SPIN's triplets, through run_spin.py."""

from __future__ import annotations

import json
import math
import sys

import pytest

from spin import run_spin
from tests.helpers import run_main
from tests.helpers.training import metrics, write_config, write_pairs

OWN_LOSS = """
from spin.alignment.methods.losses.base import Loss, outputs, sequence_logratios

def _rated(inputs, beta=0.1, offset=0.0, power=2):
    better, worse = inputs.split(inputs.label("rating"))
    chosen, rejected = sequence_logratios(inputs)
    return outputs((chosen - rejected - (better - worse) - offset).abs() ** power, chosen, rejected, beta)

rated = Loss(_rated, reads=("rating",), least={"power": 1})

def plain(inputs, beta=0.1):
    chosen, rejected = sequence_logratios(inputs)
    return outputs((-beta * (chosen - rejected)).exp(), chosen, rejected, beta)
"""


@pytest.fixture
def rated(tmp_path, monkeypatch):
    """A folder with own_rated_loss.py and pairs with chosen_rating and rejected_rating, 1.5 apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # before the folder of the test before
    sys.modules.pop("own_rated_loss", None)
    (tmp_path / "own_rated_loss.py").write_text(OWN_LOSS)
    folder = write_pairs(tmp_path / "pairs", 8)
    change_rows(folder, lambda row: row | {"chosen_rating": 4.5, "rejected_rating": 3, "chosen_note": "good"})
    return folder


def change_rows(folder, change):
    file = folder / "train_prefs.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def losses(record):
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_label_and_a_setting_reach_a_loss_of_the_user(rated, tmp_path, tiny_model, batching):
    """No file of the project names `rating`, `offset` or `power`. At the start: |0 - 1.5 - 0.5|^3 = 8."""
    own = {"loss_type": "own_rated_loss:rated", "loss_settings": {"offset": 0.5, "power": 3}, "batching": batching}
    config = write_config(tmp_path / "c.yaml", tiny_model, rated, num_train_epochs=6, **own)
    code, _, error = run_main(run_spin.main, config)
    assert code == 0, error
    record = metrics(tmp_path / "out")
    assert record["first_loss"] == pytest.approx(8.0, abs=1e-4)
    assert losses(record)[-1] < 8.0
    # the file is part of what the training was made from
    assert "loss_module_own_rated_loss" in json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert "already complete" in run_main(run_spin.main, config)[1]
    (tmp_path / "own_rated_loss.py").write_text(OWN_LOSS + "# changed\n")
    code, _, error = run_main(run_spin.main, config)
    assert code == 2 and "belongs to another training run (loss_module_own_rated_loss differ)" in error


def test_what_does_not_fit_an_own_loss_is_refused(rated, tmp_path, tiny_model):
    def refusal(**settings):
        code, _, error = run_main(run_spin.main, write_config(tmp_path / "c.yaml", tiny_model, rated, **settings))
        assert code == 2 and not (tmp_path / "out").exists()
        return error

    own = {"loss_type": "own_rated_loss:rated"}
    assert "it takes offset, power; did you mean 'offset'?" in refusal(**own, loss_settings={"ofset": 1})
    assert "'power' in loss_settings is 0.5: set it to 1 or more" in refusal(**own, loss_settings={"power": 0.5})
    assert "does not use it" in refusal(**own, label_smoothing=0.1)
    assert "module own_rated_loss has no rate" in refusal(loss_type="own_rated_loss:rate")
    change_rows(rated, lambda row: row | ({"rejected_rating": None} if row["prompt_id"] == "p0" else {}))
    assert "(prompt p0): rejected_rating is None, not a finite number" in refusal(**own)
    change_rows(rated, lambda row: {name: value for name, value in row.items() if "rating" not in name})
    sentence = refusal(**own)
    assert "reads chosen_rating and rejected_rating, which the pairs" in sentence and "add them as numbers" in sentence


def test_triplets_train_without_a_reference(tmp_path, tiny_model):
    """T-SPIN: packed and padded start at the same loss, no reference log-probs are computed, both advantages grow."""
    folder = write_pairs(tmp_path / "pairs", 8)
    words = ["zero", "a", "bb!", "ccc"]

    def with_initial(row):
        text = words[int(row["prompt_id"][1:]) % 4]
        return row | {"initial": [row["chosen"][0], {"role": "assistant", "content": text}]}

    change_rows(folder, with_initial)
    first = {}
    for batching in ("packed", "padded"):
        out = tmp_path / batching
        own = {"loss_type": "tspin", "loss_settings": {"historical_weight": 0.5}, "length_normalize": True, "beta": 1.0}
        config = write_config(
            tmp_path / "c.yaml", tiny_model, folder, **own, batching=batching, num_train_epochs=6, output_dir=str(out)
        )
        code, _, error = run_main(run_spin.main, config)
        assert code == 0, error
        record = metrics(out)
        first[batching] = record["first_loss"]
        assert not (out / "reference").exists()
        history = [entry for entry in record["history"] if "loss" in entry]
        assert history[-1]["loss"] < history[0]["loss"]
        assert {"logps/chosen", "logps/rejected", "logps/initial"} <= history[0].keys()
        assert not [name for name in history[0] if name.startswith("drift")]
    # a random model gives every token about the same log-prob: near 1.5 ln 2
    assert first["packed"] == pytest.approx(1.5 * math.log(2), abs=0.3)
    assert first["packed"] == pytest.approx(first["padded"], rel=1e-4)
    config = write_config(tmp_path / "c.yaml", tiny_model, folder, loss_type="tspin", reference_dir="somewhere")
    assert "reference_dir is set, but loss_type tspin needs no reference" in run_main(run_spin.main, config)[2]
