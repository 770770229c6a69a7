"""SFT with two real processes under ZeRO-3 and FSDP2 gives the losses, metrics and weights of one process."""

import pytest

from tests.helpers.online import write_prompts
from tests.helpers.training import TWO_PROCESSES, difference, launcher, metrics, train, write_config

SETTINGS = {"dataset_splits": ["train"], "max_steps": 4, "label_smoothing_factor": 0.1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"), 22, answered=True)


@pytest.fixture(scope="module")
def one_process(tiny_model, prompts, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("one") / "c.yaml", tiny_model, prompts, **SETTINGS)
    train(config, program="run_sft")
    return config.parent / "out"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_two_processes_give_the_same_weights_as_one(one_process, tiny_model, prompts, tmp_path, kind):
    config = write_config(tmp_path / "c.yaml", tiny_model, prompts, **SETTINGS | {"per_device_train_batch_size": 2})
    # One or two rows fit: the processes have different numbers of micro-batches and must wait for each other.
    launch = launcher(*TWO_PROCESSES[kind])
    train(config, "--max_tokens_per_batch=60", launch=launch, program="run_sft", DS_ACCELERATOR="cpu")
    ours, theirs = (
        [entry for entry in metrics(folder)["history"] if "loss" in entry] for folder in (tmp_path / "out", one_process)
    )
    assert len(ours) == len(theirs) == 4
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], abs=2e-5), name
    assert difference(tmp_path / "out", one_process) < 1e-4
