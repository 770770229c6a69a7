"""Two iterations of T-SPIN by ``spin run``: the initial model answers once, its responses are in the pairs of both."""

from __future__ import annotations

import pytest

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.core.parquet import read_rows
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.preflight import check_settings
from spin.alignment.pipeline.stages import make_stages
from spin.alignment.pipeline.validate import validate
from tests.helpers import run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

TSPIN = {
    **TRAINING,
    "max_steps": 2,
    "save_strategy": "no",
    "loss_type": "tspin",
    "loss_settings": {"historical_weight": 0.5},
}


def tspin_run(root, **changes):
    data = {"train": str(root / "data")}
    return write_config(
        root / "config.yaml", tiny_run(root, data=data, overrides=None, evaluate=None, train=TSPIN, **changes)
    )


def rows_of(folder):
    return {row["prompt_id"]: row for path in sorted(folder.glob("*.parquet")) for row in read_rows(path)}


def test_the_initial_model_is_a_stage_of_its_own(tmp_path):
    config = load_run_config(tspin_run(tmp_path))
    stages = {stage.name: stage for stage in make_stages(config)}
    assert next(iter(stages)) == "initial/generate" and not stages["initial/generate"].kind.can_run_beside
    folder = str(config.initial_dir)
    for iteration in (0, 1):
        stage = stages[f"iter{iteration}/convert"]
        assert stage.commands[0][-1] == f"--initial={folder}"
        assert folder in [source.name for source in stage.sources]
    assert stages["initial/generate"].configs[0].seed != stages["iter0/generate"].configs[0].seed
    plain = load_run_config(tspin_run(tmp_path), ["--train.loss_type=sigmoid", "--train.loss_settings=null"])
    assert "initial/generate" not in [stage.name for stage in make_stages(plain)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--weigh.weighting=drift"], "which get no token weights: remove the section 'weigh'"),
        (["--data.prompts=[a, b]"], "generated once for all iterations: name a single data set as data.prompts"),
        (["--train.loss_settings.historic=1"], "names 'historic', which loss_type tspin does not know"),
    ],
)
def test_what_a_run_of_triplets_cannot_do_is_refused(tmp_path, changes, sentence):
    config = load_run_config(tspin_run(tmp_path), changes)
    with pytest.raises(InputError, match=sentence):
        check_settings(config, "config.yaml")


@pytest.mark.slow
def test_two_iterations(tmp_path):
    code, _, error = run_main(cli.main, "run", tspin_run(tmp_path))
    assert code == 0, error
    run = tmp_path / "run"
    initial = rows_of(run / "initial" / "generated")
    assert len(initial) == 24
    for iteration in (0, 1):
        pairs = rows_of(run / f"iter{iteration}" / "pairs")
        assert {key: row["initial"] for key, row in pairs.items()} == {
            key: row["rejected"] for key, row in initial.items()
        }
        assert all(row["initial_token_ids"] == initial[key]["rejected_token_ids"] for key, row in pairs.items())
        # the same model in iteration 0, but other random numbers
        assert any(row["rejected"] != row["initial"] for row in pairs.values())
        checkpoint = run / f"iter{iteration}" / "checkpoint"
        assert read_json(checkpoint / "metrics.json")["first_loss"] > 0 and not (checkpoint / "reference").exists()
    assert validate(run, None)[1] == []
