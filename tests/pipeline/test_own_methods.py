"""Losses, pairings and weightings by ``module:function`` in ``spin run``: checked before the start, noticed when they change."""

from __future__ import annotations

import re
import sys

import pytest

from spin import cli
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.preflight import check_settings
from spin.alignment.pipeline.stages import make_stages
from tests.helpers import run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

OWN = """
from spin.alignment.methods.losses.base import Loss, outputs, sequence_logratios
from spin.alignment.methods.pairings.base import Labelled, own_pair

def _longest(rows):
    rows = sorted(rows, key=lambda row: len(row["rejected_token_ids"]))
    return [own_pair(rows[-1], rows[0]) | {"chosen_length": 2.0, "rejected_length": 1.0}]

longest = Labelled(_longest, labels=("length",))

def _by_length(inputs, beta=0.1):
    chosen, rejected = sequence_logratios(inputs)
    return outputs((chosen - rejected - inputs.split(inputs.label("length"))[0]) ** 2, chosen, rejected, beta)

by_length = Loss(_by_length, reads=("length",))

def first_token(pair):
    return ([1.0] + [0.0] * (len(pair.chosen_ids) - 1), [1.0] + [0.0] * (len(pair.rejected_ids) - 1))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_methods", None)
    path = tmp_path / "own_methods.py"
    path.write_text(OWN)
    return path


def sections(loss="own_methods:by_length", pairing="own_methods:longest", weighting="own_methods:first_token"):
    return {
        "iterations": 1,
        "overrides": None,
        "generate": {"num_samples": 2},
        "convert": {"pairing": pairing, "scorer": "length_penalty"},
        "weigh": {"weighting": weighting},
        "train": {**TRAINING, "loss_type": loss},
    }


def test_own_methods_are_checked_and_noticed_when_they_change(module, tmp_path):
    config = load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **sections())))
    check_settings(config, "config.yaml")
    own = {"iter0/convert": "pairing", "iter0/weigh": "weighting", "iter0/train": "loss_type"}
    stages = [stage for stage in make_stages(config) if stage.name in own]
    before = [stage.inputs(RunManifest(config.run_dir)) for stage in stages]
    module.write_text(OWN + "# changed\n")
    for stage, old in zip(stages, before, strict=True):
        new = stage.inputs(RunManifest(config.run_dir))
        (changed,) = {key for key in new if new[key] != old[key]}
        assert changed.startswith(f"content of {own[stage.name]} own_methods:")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"pairing": "ground_truth"},
            "reads lengths, which pairing ground_truth does not write: name it among the labels of",
        ),
        ({"pairing": "own_methods:shortest"}, "module own_methods has no shortest: correct the pairing"),
        ({"weighting": "no_such_module_here:f"}, "no_such_module_here of weighting .* cannot be imported"),
        ({"loss": "own_methods:_missing"}, "module own_methods has no _missing: correct the loss_type"),
    ],
)
def test_what_does_not_fit_is_refused(module, tmp_path, changes, sentence):
    values = tiny_run(tmp_path, **sections(**changes))
    if changes.get("pairing") == "ground_truth":
        del values["convert"]["scorer"]
    code, _, error = run_main(cli.main, "run", write_config(tmp_path / "config.yaml", values))
    assert code == 2 and len(error.strip().splitlines()) == 1
    assert re.search(sentence, error), error
    assert not (tmp_path / "run").exists()
