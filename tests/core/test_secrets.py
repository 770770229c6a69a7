"""Secrets wherever a user may give one: none of them is in any file of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.core.secrets import is_secret, refuse_stored_secrets, without_secrets
from spin.alignment.core.server_link import ServerLink, checked_url
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.runner import Pipeline, secrets_of
from spin.alignment.pipeline.stages import make_stages
from tests.helpers import run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

TOKEN = "hf_PlantedSecretOfTheUser"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("hub_token", True),
        ("train.hub_token", True),
        ("push_to_hub_token", True),
        ("api_key", True),
        ("judge_api_key", True),
        ("model_init_kwargs.token", True),
        ("wandb-api-key", True),
        ("db_password", True),
        ("max_new_tokens", False),
        ("eos_token", False),
        ("pad_token", False),
        ("token_weights", False),
        ("key", False),
        ("tokenizer", False),
    ],
)
def test_secrets_are_known_by_their_names(key, expected):
    assert is_secret(key) is expected


def test_settings_without_secrets():
    values = {"train": {"beta": 1, "hub_token": TOKEN, "kwargs": {"token": TOKEN}}, 2: {"hub_token": TOKEN}}
    assert without_secrets(values) == {"train": {"beta": 1, "kwargs": {}}, 2: {}}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"model": f"https://user:{TOKEN}@host/model"}, "model"),
        ({"data": {"train": f"https://{TOKEN}@host/rows"}}, "data.train"),
        ({"generate": {"base_url": f"https://host/v1?api_key={TOKEN}"}}, "generate.base_url"),
        ({"data": {"prompts": ["a", f"s3://key:{TOKEN}@bucket/b"]}}, "data.prompts"),
        ({"dataset_mixer": {f"https://host/a?access_token={TOKEN}": 1.0}}, "dataset_mixer"),
        ({"train": {"model_init_kwargs": {"token": TOKEN}}}, "train.model_init_kwargs.token"),
        ({"convert": {"judge_api_key": TOKEN}}, "convert.judge_api_key"),
    ],
)
def test_a_secret_that_would_be_stored_is_refused_without_repeating_it(values, key):
    with pytest.raises(InputError, match=f"'{key}' in run.yaml .*which would be stored with the results") as refusal:
        refuse_stored_secrets(values, "run.yaml")
    assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize(
    "address", ["http://localhost:8000/v1", "hf://datasets/a/b@main", "user@host:/data", "a/b?c", "x@y"]
)
def test_ordinary_addresses_are_taken(address):
    refuse_stored_secrets({"data": {"train": address}, "hub_token": TOKEN}, "run.yaml")


def test_no_file_of_a_run_has_the_token(tmp_path, monkeypatch):
    """The token is given in every section that takes one, in a file that is referred to, and on the command line."""
    base = write_config(tmp_path / "base.yaml", {**TRAINING, "hub_token": TOKEN})
    secret = {**TRAINING, "hub_token": TOKEN}
    sections = {
        "sft": secret,
        "control": secret,
        "train": {"config": str(base)},
        "overrides": {1: {"hub_token": TOKEN}},
    }
    weigh = {"weighting": "reverse_dpo", "train": {"hub_token": TOKEN}}
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, weigh=weigh, **sections))
    environments = []

    def record(line: Pipeline) -> None:
        environments.append(line.cluster.children.environment)
        for stage in line.stages:
            stage.kind.prepare(stage)
            line.manifest.start(stage.name, stage.inputs(line.manifest))
            line.cluster.children.run(stage.name, ["echo", *map(str, stage.commands)])

    monkeypatch.setattr(Pipeline, "run", record)
    monkeypatch.setattr("spin.alignment.report.write_report", lambda config: None)
    code, out, err = run_main(cli.main, "run", config, f"--train.hub_token={TOKEN}")
    assert code == 0, err
    assert environments[0]["HF_TOKEN"] == TOKEN
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 12 and {"run.yaml", "manifest.json", "train.yaml"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == [] and TOKEN not in out + err
    assert TOKEN not in run_main(cli.main, "config", config, f"--train.hub_token={TOKEN}")[1]


def test_two_tokens_are_refused(tmp_path):
    values = tiny_run(tmp_path, sft={**TRAINING, "hub_token": "hf_one"}, train={**TRAINING, "hub_token": "hf_two"})
    stages = make_stages(load_run_config(write_config(tmp_path / "config.yaml", values)))
    with pytest.raises(InputError, match="has another hub_token than the stages before it") as refusal:
        secrets_of(stages)
    assert "hf_" not in str(refusal.value)


def test_a_training_keeps_the_token_out_of_its_files(tmp_path):
    """The Trainer stores its arguments in every checkpoint."""
    from spin.alignment.training.settings import inputs_record, read_settings
    from spin.alignment.training.sft import SFTArguments

    run = tiny_run(tmp_path)
    values = {"model_name_or_path": run["model"], "dataset_mixer": {run["data"]["train"]: 1.0}, "output_dir": "out"}
    settings = read_settings({**values, "use_cpu": True, "hub_token": TOKEN}, "c.yaml", SFTArguments)
    assert settings.hub_token == TOKEN and settings.arguments.hub_token is None
    assert TOKEN not in repr(settings) + str(inputs_record(settings, "m", "d")) + settings.arguments.to_json_string()


def test_a_configuration_is_pickled_without_the_token_for_the_hub(tmp_path):
    """The Trainer pickles its arguments into every checkpoint (training_args.bin)."""
    import torch

    import spin

    scored = {"scorer": "tests.helpers.online:share_of_letters"}
    for kind, more in ((spin.SPINConfig, {}), (spin.OnlineConfig, scored)):
        config = kind(output_dir=str(tmp_path / "out"), use_cpu=True, hub_token=TOKEN, beta=0.25, **more)
        torch.save(config, tmp_path / "training_args.bin")
        assert (
            TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes() and TOKEN not in config.to_json_string()
        )
        found = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert (config.hub_token, found.hub_token, found.beta) == (TOKEN, None, 0.25)


def test_a_server_that_repeats_the_key_does_not_put_it_into_a_log(server, connect, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    server.models = {"data": [{"id": "tiny"}]}
    server.behave = lambda handler, body: handler.say(401, {"error": {"message": f"Incorrect API key: {TOKEN}"}})
    from tests.helpers.openai_backend import REQUESTS, SAMPLING

    with pytest.raises(InputError, match=r"Incorrect API key: \(the key\)") as refusal:
        connect().generate(REQUESTS, SAMPLING)
    assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize(
    "url", [f"http://host/v1?api_key={TOKEN}", f"http://u:{TOKEN}@host/v1", f"http://host/v1#{TOKEN}"]
)
def test_a_key_in_the_address_of_a_server_is_refused(url):
    with pytest.raises(InputError, match="base_url contains") as refusal:
        checked_url(url)
    assert TOKEN not in str(refusal.value)
    with pytest.raises(InputError):
        ServerLink(url, connections=1)


def test_checkpoints_of_the_trainer_are_as_the_umask_says(tmp_path):
    from transformers import TrainerState, TrainingArguments

    from spin.alignment.training.run import shared_checkpoints

    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "model.safetensors").touch(0o600)
    before = os.umask(0o022)
    try:
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        shared_checkpoints().on_save(arguments, TrainerState(global_step=7), None)
    finally:
        os.umask(before)
    assert modes(folder) == {"0o644"}


def modes(folder: Path) -> set[str]:
    return {oct(os.stat(path).st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}  # noqa: PTH116


@pytest.mark.parametrize(("umask", "mode"), [(0o022, "0o644"), (0o002, "0o664"), (0o077, "0o600")])
def test_files_are_as_the_umask_says(tmp_path, umask, mode):
    from spin.alignment.core.files import write_text_atomic
    from spin.alignment.core.lock import folder_lock
    from spin.alignment.models.saving import save_checkpoint
    from tests.helpers import char_tokenizer, tiny_llama

    tokenizer = char_tokenizer()
    before = os.umask(umask)
    try:
        save_checkpoint(tiny_llama(len(tokenizer)), tokenizer, tmp_path / "model")
        write_text_atomic(tmp_path / "rows.json", "{}")
        with folder_lock(tmp_path / "locked", setting="output_dir"):
            found = modes(tmp_path)
    finally:
        os.umask(before)
    assert found == {mode} and (tmp_path / "model" / "model.safetensors").is_file()
