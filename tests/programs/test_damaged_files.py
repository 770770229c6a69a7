"""Stored files with flipped bits, cut or empty: named in one line, made again where they can be, and never used."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spin import run_online, run_spin
from spin.alignment.core.content_hash import HASHES_FILE, begin_hashes, lacks_hashes, write_hashes
from spin.alignment.training import watched_steps
from spin.alignment.training.output_dir import damaged_part
from spin.generate import main as generate
from tests.helpers import flipped, run_main
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import difference, pairs, write_config  # noqa: F401  (pairs is a fixture)
from tests.helpers.weights import models, scoring_models, weigh  # noqa: F401  (scoring_models is a fixture)


def flip(path: Path, share: float = 0.5) -> None:
    """Flip a bit of a file at a share of its length."""
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, int(8 * len(whole) * share)))


def flip_in_rows(path: Path) -> None:
    """Flip a bit in the first page of a parquet file's first column."""
    place = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = place.dictionary_page_offset or place.data_page_offset
    path.write_bytes(flipped(path.read_bytes(), 8 * (start + place.total_compressed_size - 3)))


def unfinish(out: Path) -> None:
    """Take away what a training writes last, as if it had been killed before."""
    for name in ("metrics.json", "config.json"):
        (out / name).unlink()
    for checkpoint in (out / "checkpoints").iterdir():  # where a complete training has put them
        checkpoint.rename(out / checkpoint.name)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a finished training with the checkpoints 2 and 4, next to its configuration."""
    root = tmp_path_factory.mktemp("trained")
    config = write_config(root / "c.yaml", tiny_model, pairs, max_steps=4, save_strategy="steps", save_steps=2)
    code, _, err = run_main(run_spin.main, config)
    assert code == 0, err
    return root


@pytest.fixture
def killed(trained: Path, tmp_path: Path) -> Path:
    """A copy of the training, killed after its second checkpoint; its paths are still those of ``trained``."""
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out)
    unfinish(out)
    text = (trained / "c.yaml").read_text().replace(str(trained / "out"), str(out))
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path


def test_every_file_of_a_checkpoint_is_checked(killed: Path) -> None:
    checkpoint = killed / "out" / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        HASHES_FILE,
    } <= names
    assert damaged_part(checkpoint) is None
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for content in (flipped(whole, 8 * len(whole) // 3), whole[: len(whole) // 2], b""):
            path.write_bytes(content)
            assert damaged_part(checkpoint) is not None
        path.write_bytes(whole)
    assert damaged_part(checkpoint) is None


def test_a_checkpoint_of_an_earlier_version_is_checked_as_far_as_its_files_allow(killed: Path) -> None:
    checkpoint = killed / "out" / "checkpoint-4"
    (checkpoint / HASHES_FILE).unlink()
    assert damaged_part(checkpoint) is None
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        for content in (whole[: len(whole) // 2], b""):
            (checkpoint / name).write_bytes(content)
            assert damaged_part(checkpoint) == name
        (checkpoint / name).write_bytes(whole)


@pytest.mark.slow
def test_the_last_whole_checkpoint_is_used_and_the_result_is_the_same(killed: Path, trained: Path) -> None:
    out = killed / "out"
    flip(out / "checkpoint-4" / "optimizer.pt")
    code, said, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    damaged = out / "checkpoint-4"
    sentence = (
        f"{damaged} is damaged (optimizer.pt) and set aside as checkpoint-4.damaged: resuming from checkpoint-2\n"
    )
    assert sentence in err
    assert f"resuming from {out / 'checkpoint-2'}" in said
    assert difference(out, trained / "out") == 0.0
    assert damaged_part(out / "checkpoints" / "checkpoint-4") is None  # it was written again


@pytest.mark.parametrize("content", ["", '{"epoch": 1', "[" * 100_000])
def test_a_checkpoint_whose_state_is_damaged_is_named_like_any_other(killed: Path, content: str) -> None:
    """It was complete, so it is not taken for one that a kill left unfinished, which is removed without a word."""
    out = killed / "out"
    (out / "checkpoint-4" / "trainer_state.json").write_text(content)
    (out / "checkpoint-3").mkdir()  # unfinished
    (out / "checkpoint-7").write_text("a file")
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    assert "checkpoint-4 is damaged (trainer_state.json) and set aside" in err and "checkpoint-3" not in err
    kept = out / "checkpoints"
    assert (kept / "checkpoint-4.damaged").is_dir() and not (kept / "checkpoint-3").exists()


@pytest.mark.parametrize("content", ["[1]", '{"loss": "low"}', '{"rows": null}', '{"loss": NaN}', '{"rows": true}'])
def test_json_of_another_kind_is_damage(killed: Path, content: str) -> None:
    checkpoint = killed / "out" / "checkpoint-4"
    (checkpoint / HASHES_FILE).unlink()
    assert damaged_part(checkpoint) is None
    (checkpoint / "run_sums.json").write_text(content)
    assert damaged_part(checkpoint) == "run_sums.json"


@pytest.mark.parametrize("content", ['"many"', "", "-5"])
def test_a_token_budget_without_a_hash_is_planned_again_if_it_is_no_number(killed: Path, content: str) -> None:
    (killed / "out" / ".token_budget.json.xxh3").unlink()
    (killed / "out" / "token_budget.json").write_text(content)
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    assert int((killed / "out" / "token_budget.json").read_text()) > 0


@pytest.mark.slow
def test_without_a_whole_checkpoint_the_training_starts_over(killed: Path, trained: Path) -> None:
    out = killed / "out"
    (out / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    flip(out / "checkpoint-2" / "trainer_state.json")
    (store,) = (out / "reference").glob("train-*.arrow")
    flip(store)
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    assert "checkpoint-4.damaged" in err
    assert f"{store} is damaged: computed again\n" in err
    assert difference(out, trained / "out") == 0.0


def test_a_named_checkpoint_that_is_damaged_is_refused(killed: Path) -> None:
    checkpoint = killed / "out" / "checkpoint-2"
    flip(checkpoint / "model.safetensors")
    code, _, err = run_main(run_spin.main, killed / "c.yaml", f"--resume_from_checkpoint={checkpoint}")
    assert code == 2
    assert f"resume_from_checkpoint {checkpoint} is damaged (model.safetensors)" in err


def test_a_damaged_reference_of_a_resumed_run_is_never_used(killed: Path) -> None:
    """The policy has moved, so it cannot compute the reference; what to do is said."""
    (store,) = (killed / "out" / "reference").glob("train-*.arrow")
    flip(store, 0.8)
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 2
    assert "computed again" not in err and "a resumed run cannot compute it" in err
    assert store.exists()  # its owner may be able to restore it
    assert f"reference_dir: {store.parent}" in err


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_damaged_inputs_are_not_taken_for_those_of_another_run(killed: Path, share: float) -> None:
    record = killed / "out" / "inputs.json"
    flip(record, share)
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 2 and err.count("error: ") == 1
    assert f"{record} is damaged: it says which training run the folder belongs to" in err


def test_a_checkpoint_whose_hashes_were_not_written_is_not_used(killed: Path, trained: Path) -> None:
    """Killed before the hashes, so that nothing says whether its files are what was written."""
    out = killed / "out"
    begin_hashes(out / "checkpoint-4")
    flip(out / "checkpoint-4" / "model.safetensors")
    code, said, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    assert f"resuming from {out / 'checkpoint-2'}" in said
    assert difference(out, trained / "out") == 0.0


def test_a_damaged_first_loss_does_not_end_a_training(killed: Path) -> None:
    (killed / "out" / "first_loss.json").write_text("0.7931\n")
    code, _, err = run_main(run_spin.main, killed / "c.yaml")
    assert code == 0, err
    assert "metrics.json has no first_loss: " in err and "first_loss.json is missing or damaged" in err
    assert json.loads((killed / "out" / "metrics.json").read_text())["first_loss"] is None


def test_an_older_checkpoint_is_deleted_only_once_the_new_one_has_its_hashes(
    tiny_model: Path,
    pairs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed_at_the_second(folder: Path) -> None:
        if folder.name == "checkpoint-2":
            raise KeyboardInterrupt
        write_hashes(folder)

    monkeypatch.setattr(watched_steps, "write_hashes", killed_at_the_second)
    config = write_config(
        tmp_path / "c.yaml", tiny_model, pairs, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    with contextlib.suppress(KeyboardInterrupt):
        run_main(run_spin.main, config)
    out = tmp_path / "out"
    assert damaged_part(out / "checkpoint-1") is None and lacks_hashes(out / "checkpoint-2")
    monkeypatch.undo()
    code, said, err = run_main(run_spin.main, config)
    assert code == 0, err
    assert f"resuming from {out / 'checkpoint-1'}" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]


@pytest.mark.slow
def test_a_torn_part_of_the_reference_is_computed_again(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    (store,) = (trained / "out" / "reference").glob("train-*.arrow")
    folder = tmp_path / "out" / "reference"
    folder.mkdir(parents=True)
    parts = [folder / f".{store.name}.part-{number}" for number in range(2)]
    parts[0].write_bytes(store.read_bytes()[:300])
    parts[1].write_bytes(b"")
    text = (trained / "c.yaml").read_text().replace(str(trained / "out"), str(tmp_path / "out"))
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = run_main(run_spin.main, tmp_path / "c.yaml")
    assert code == 0, err
    assert all(f"{part} is damaged: its pairs are computed again\n" in err for part in parts)
    assert (folder / store.name).read_bytes() == store.read_bytes()
    assert not any(folder.glob(".*part-*"))


def test_token_weights_and_their_scores_are_computed_again(scoring_models: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "weighed"
    arguments = (scoring_models, out, "--weighting", "reverse_dpo", *models(scoring_models))
    assert weigh(*arguments)[0] == 0
    path = out / "train_prefs-00001-of-00002.parquet"
    whole = path.read_bytes()
    stores = sorted((out / ".scores").glob("*.arrow"))
    flip_in_rows(path)
    flip(stores[0], 0.7)
    code, _, err = weigh(*arguments)
    assert code == 0, err
    assert f"train: weights computed again, because {path} is " in err
    assert f"{stores[0]} is damaged: computed again" in err
    assert path.read_bytes() == whole
    for content in (whole[:-100], b""):
        path.write_bytes(content)
        assert weigh(*arguments)[0] == 0
        assert path.read_bytes() == whole


def test_a_finished_fraction_with_a_damaged_body_is_generated_again(tiny_model: Path, tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "prompts", count=6), tmp_path / "out"
    arguments = ["--model", tiny_model, "--input_dir", prompts, "--output_dir", out, "--max_new_tokens", 8]
    assert run_main(generate, *arguments)[0] == 0
    path = out / "train-00000.parquet"
    whole = path.read_bytes()
    flip_in_rows(path)
    code, _, err = run_main(generate, *arguments)
    assert code == 0, err
    assert "set aside as train-00000.torn and generated again" in err
    assert path.read_bytes() == whole


def test_a_model_is_saved_the_same_wherever_its_folder_is(trained: Path) -> None:
    """No path and no time in what decides the hash of a model: iterations of two runs are equal in bytes."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert str(trained) not in (trained / "out" / name).read_text()
    assert "_name_or_path" not in json.loads((trained / "out" / "config.json").read_text())


def test_an_online_checkpoint_that_lost_its_reference_is_set_aside(tiny_model: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts")
    settings = {"max_steps": 3, "ref_update_freq": 2, "save_strategy": "steps", "save_steps": 1}
    whole, lost = (write_online(tmp_path / name, tiny_model, prompts, **settings) for name in ("whole", "lost"))
    for config in (whole, lost):
        code, _, err = run_main(run_online.main, config)
        assert code == 0, err
    (tmp_path / "lost" / "out" / "metrics.json").unlink()
    (tmp_path / "lost" / "out" / "checkpoints" / "checkpoint-3" / "reference.safetensors").unlink()
    code, _, said = run_main(run_online.main, lost)
    assert (
        code == 0 and "checkpoint-3 is damaged (reference.safetensors)" in said and "resuming from checkpoint-2" in said
    )
    assert difference(tmp_path / "whole" / "out", tmp_path / "lost" / "out") == 0.0
