"""``spin config``: every value of a configuration, and where it comes from."""

from __future__ import annotations

import pytest

from spin import cli
from spin.alignment.core.origins import origins
from spin.alignment.pipeline.resolve import program_of, resolve
from tests.helpers import REPOSITORY, run_main
from tests.helpers.runs import tiny_run, write_config


def by_key(path, *arguments, program=None, every=False):
    name, rows = resolve(path, arguments, program, every)
    assert len({row.key for row in rows}) == len(rows)
    return name, {row.key: (row.value, row.origin) for row in rows}


def test_a_value_comes_from_the_topmost_file_that_sets_it(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("a:\n  b: 1\n  c: 2\ndataset_mixer: {old: 1.0}\n")
    top.write_text("extends: base.yaml\n\na: {b: 3}\ndataset_mixer: {new: 1.0}\n")
    assert origins(top, ["--a.c=5", "--d=1"]) == {
        "a.b": f"{top}:3",
        "a.c": "command line",
        "dataset_mixer": f"{top}:4",
        "d": "command line",
    }


def test_a_training_shows_every_key_of_its_own(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\nwarmup_ratio: 0.2\ndataset_mixer: {p: 1}\nbeta: 1e-1\n")
    name, rows = by_key(path, "--eta=2")
    assert name == "run_spin"
    assert rows["beta"] == (0.1, f"{path}:5") and rows["eta"] == (2.0, "command line")
    assert rows["warmup_steps"] == (0.2, f"{path}:3")  # under its new name
    assert rows["dataset_mixer"] == ({"p": 1.0}, f"{path}:4") and rows["lora_r"] == (16, "default")
    assert "adam_beta1" not in rows and by_key(path, every=True)[1]["adam_beta1"] == (0.9, "default")


def test_a_run_shows_its_sections_with_what_it_sets_itself(tmp_path):
    path = write_config(tmp_path / "run.yaml", tiny_run(tmp_path))
    name, rows = by_key(path, "--generate.temperature=0.5")
    assert name == "run"
    assert rows["generate.temperature"] == (0.5, "command line")
    assert rows["generate.model"] == (str(tmp_path / "model"), "set by the run")
    assert rows["generate.top_p"] == (1.0, "default") and rows["history"][1] == "default"
    assert rows["train.dataset_splits"] == (["train_prefs"], "set by the run")
    assert rows["train.beta"] == (0.1, "default") and rows["train.max_steps"][1].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("name", "program"),
    [
        *(("demo", "run"), ("demo_online", "run"), ("config", "run_spin"), ("config_iter3", "run_spin")),
        *(("online_gsm8k", "run_online"), ("online_gsm8k_7b", "run_online"), ("online_sppo_math", "run_online")),
    ],
)
def test_the_program_of_shipped_configurations_is_recognised(name, program, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert resolve(f"configs/{name}.yaml", [], None, False)[0] == program


def test_sft_is_recognised_by_its_splits():
    assert program_of({"dataset_splits": ["train"], "learning_rate": 1e-5}) == "run_sft"
    assert program_of({"init_from_config": True}) == "run_sft"


def test_the_command(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\nbeta: 0.3\n")
    code, out, err = run_main(cli.main, "config", path, "--program=run_spin")
    assert code == 0, err
    assert [line.split() for line in out.splitlines() if " beta " in line] == [["beta", "0.3", f"{path}:2"]]
    code, _, err = run_main(cli.main, "config", path, "--program=run_sft")
    assert code == 2 and "unknown key 'beta'" in err
    code, _, err = run_main(cli.main, "config", path, "--betta=1")
    assert code == 2 and "did you mean 'beta'" in err
    code, _, err = run_main(cli.main, "config", path, "--beta=0")
    assert code == 2 and "'beta'" in err and "set it to a number above 0" in err
