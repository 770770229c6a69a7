"""A disk that is full ends a training in one sentence; what was complete stays, and the same command goes on."""

from __future__ import annotations

import resource
import sys

import pytest

from spin import run_spin
from spin.alignment.core.files import is_disk_full
from spin.alignment.models.folder import is_complete_checkpoint
from tests.helpers import run_command, run_main
from tests.helpers.training import difference, metrics, write_config

# Largest file that can be written: the reference store fails at 2k, the weights at 100k, the optimiser's state at 200k.
SIZES = [2_000, 100_000, 200_000]
LIMITED = (
    "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
    "from spin import run_spin\n"
    "from spin.alignment.core.program import run_program\n"
    "run_program(run_spin.main, sys.argv[2:])\n"
)


def config_of(folder, tiny_model, pairs, **settings):
    return write_config(folder / "c.yaml", tiny_model, pairs, optim="adamw_torch", save_strategy="epoch", **settings)


@pytest.mark.parametrize("size", SIZES)
def test_one_sentence_and_the_same_command_goes_on(tiny_model, pairs, reference_weights, tmp_path, size):
    config = config_of(tmp_path, tiny_model, pairs, num_train_epochs=2)
    if size < 10_000:  # pytest's own files would not fit either
        done = run_command([sys.executable, "-c", LIMITED, size, config], timeout=200)
        code, said = done.returncode, done.stderr
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            code, _, said = run_main(run_spin.main, config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said, said[-3000:]
    assert sentence.startswith("error: no space left on the disk while") and "run the same command again" in sentence
    out = tmp_path / "out"
    assert not is_complete_checkpoint(out) and not (out / "metrics.json").exists()
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".saving-*")) and not list(out.rglob("*.tmp"))
    assert run_main(run_spin.main, config)[0] == 0
    assert difference(out, reference_weights) == 0.0


@pytest.fixture(scope="module")
def reference_weights(tiny_model, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_main(run_spin.main, config_of(folder, tiny_model, pairs, num_train_epochs=2))[0] == 0
    return folder / "out"


@pytest.mark.parametrize("place", ["checkpoint", "model", "metrics"])
def test_what_was_complete_is_kept(tiny_model, pairs, reference_weights, tmp_path, monkeypatch, place):
    """The disk fills up later: at the second checkpoint, at the final model, at the metrics."""
    from spin.alignment.training import run, trained_policy, watched_steps

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    config = config_of(tmp_path, tiny_model, pairs, num_train_epochs=2)
    if place == "checkpoint":
        real = watched_steps.WatchedSteps.save_model

        def save_model(self, *arguments, **settings):
            real(self, *arguments, **settings)
            if self.state.global_step == 12:
                raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

        monkeypatch.setattr(watched_steps.WatchedSteps, "save_model", save_model)
    elif place == "model":
        monkeypatch.setattr(trained_policy, "save_checkpoint", full)
    else:
        monkeypatch.setattr(run, "write_json_atomic", full)
    code, _, err = run_main(run_spin.main, config)
    assert code == 2 and "Traceback" not in err, err
    last = {"checkpoint": "checkpoint-6", "model": "checkpoint-12", "metrics": "checkpoint-12"}[place]
    assert f"which resumes from {tmp_path / 'out' / last}" in err.strip().splitlines()[-1]
    assert max(int(path.name[11:]) for path in (tmp_path / "out").glob("checkpoint-*")) == int(last[11:])
    monkeypatch.undo()
    code, said, err = run_main(run_spin.main, config)
    assert code == 0 and "resuming from" in said, err
    assert difference(tmp_path / "out", reference_weights) == 0.0
    assert metrics(tmp_path / "out")["train_loss"] == pytest.approx(metrics(reference_weights)["train_loss"], abs=1e-12)
    ours, theirs = (metrics(folder)["accounting"] for folder in (tmp_path / "out", reference_weights))
    assert ours == theirs and ours["trained"]["rows"] == 48


def test_how_libraries_say_that_the_disk_is_full():
    assert is_disk_full(OSError(28, "x")) and is_disk_full(
        RuntimeError("I/O error: No space left on device (os error 28)")
    )
    try:
        try:
            raise OSError(27, "File too large")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert is_disk_full(error)
    assert is_disk_full(RuntimeError("basic_ios::clear: iostream error"))
    assert not is_disk_full(OSError(13, "Permission denied")) and not is_disk_full(ValueError("unexpected"))
