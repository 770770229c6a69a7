"""Which splits a training reads: every one that is named, each row once, held-out ones never for training."""

from __future__ import annotations

import json
import types
from pathlib import Path

import datasets
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.config import DataConfig
from spin.alignment.data.mixture import Piece, pieces_of
from spin.alignment.data.preferences import mix_preferences
from spin.alignment.data.split_names import is_held_out, same_splits
from tests.helpers import char_tokenizer


def write(folder: Path, **counts: int) -> str:
    """Write preference pairs: so many in the file of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        rows = [{"prompt": f"{split} {number}", "chosen": "5", "rejected": "6"} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_all_named_splits_are_trained_on(tmp_path):
    folder = write(tmp_path, train_prefs=40, more_prefs=8, test_prefs=3, valid=2)
    mixed = mix_preferences({folder: 1.0}, ["train_prefs", "more_prefs", "test_prefs", "valid"], seed=0)
    assert (len(mixed["train"]), len(mixed["test"])) == (48, 5)
    half = mix_preferences({folder: 0.5}, ["train_prefs", "more_prefs"], seed=0)["train"]
    assert sum(row["chosen"][0]["content"].startswith("more") for row in half) == 4 and len(half) == 24


def test_sft_reads_all_named_splits_once(tmp_path):
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.sft_data import load_ground_truth

    folder = write(tmp_path, train=4, more=2, test=1)
    settings = types.SimpleNamespace(arguments=types.SimpleNamespace(seed=0))
    encoder = ChatEncoder(char_tokenizer())

    def sizes(*splits: str) -> dict[str, int]:
        settings.data = DataConfig(dataset_mixer={folder: 1.0}, dataset_splits=list(splits))
        return {name: len(split.rows) for name, split in load_ground_truth(settings, encoder).items()}

    assert sizes("train", "more", "test") == {"train": 6, "test": 1}
    with pytest.raises(InputError, match="are the same rows"):
        sizes("train", "train")
    with pytest.raises(InputError, match="are the same rows"):
        sizes("train", "train_prefs")


@pytest.mark.parametrize(
    ("mixer", "splits"),
    [
        (["a"], ["train_prefs", "train_prefs"]),
        (["a"], ["train", "train_prefs"]),
        (["a", "./a"], ["train"]),
        (["a", "a/"], ["train"]),
        (["a", "link"], ["train"]),
        (["a", "a/train.jsonl"], ["train"]),
        (["a/train.jsonl"], ["train", "test"]),
        (["org/data"], ["train", "train"]),
    ],
)
def test_rows_that_would_be_read_twice_are_refused(tmp_path, monkeypatch, mixer, splits):
    write(tmp_path / "a", train=2, test=1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"are the same rows \(.*\): name each data set and split once"):
        pieces_of(dict.fromkeys(mixer, 1.0), splits)


@pytest.mark.parametrize(
    ("split", "held_out"),
    [("test", True), ("test_prefs", True), ("Test-1", True), ("test2", True), ("validation", True), ("dev_prefs", True),
     ("prefs_test", True), ("held_out", True), ("eval", True), ("train", False), ("train_prefs", False), ("contest", False),
     ("testament", False), ("latest_prefs", False), ("math", False)],
)  # fmt: skip
def test_held_out_splits_are_recognised_by_a_word(split, held_out):
    assert is_held_out(split) == held_out


def test_a_name_that_says_both_is_refused(tmp_path):
    with pytest.raises(InputError, match="the split 'train_test' is named both for training and for evaluation"):
        pieces_of({write(tmp_path, train_test=1): 1.0}, ["train_test"])
    with pytest.raises(InputError, match=r"dataset_splits is \['validation'\]: add a training split"):
        pieces_of({write(tmp_path, validation=1): 1.0}, ["validation"])


def test_names_of_one_split():
    assert same_splits("train") == ("train", "train_prefs") and same_splits("test_prefs") == ("test_prefs", "test")


def test_a_configuration_for_each_data_set():
    config = DataConfig(dataset_mixer={"org/a": 1.0, "org/b": 0.5}, dataset_configs=["main", "x"])
    assert config.dataset_mixer == {"org/a:main": 1.0, "org/b:x": 0.5}
    assert DataConfig(**vars(config)) == config
    with pytest.raises(InputError, match="dataset_configs names 1 configurations for 2 data sets"):
        DataConfig(dataset_mixer={"org/a": 1.0, "org/b": 0.5}, dataset_configs=["main"])


def test_a_run_names_the_configuration_of_its_data_once():
    from spin.alignment.pipeline.config import RunData

    data = RunData(train="org/a", test="org/a", prompts=["org/b", "org/c:main"], config="main")
    assert (data.train, data.test, data.prompts) == ("org/a:main", "org/a:main", ["org/b:main", "org/c:main"])
    assert RunData(**vars(data)) == data and RunData(train="org/a", config="x").played() == ("org/a:x", "train")


def test_programs_name_the_configuration_of_their_data():
    from spin.alignment.core.flags import from_arguments, to_arguments
    from spin.alignment.evaluation.config import EvaluateConfig
    from spin.alignment.generation.config import GenerateConfig

    common = ["--model", "m", "--input_dir", "org/a", "--config", "main"]
    for config_class, output in ((GenerateConfig, "--output_dir"), (EvaluateConfig, "--output_file")):
        config = from_arguments(config_class, [*common, output, "o"], "program")
        assert config.input_dir == "org/a:main"
        assert from_arguments(config_class, to_arguments(config), "program") == config


def test_held_out_splits_are_used_in_full():
    pieces = pieces_of({"some/name": 0.5, "other/name": 1}, ["train", "test"])
    assert [(piece.use, piece.source, piece.fraction) for piece in pieces] == [
        *(("train", "some/name", 0.5), ("train", "other/name", 1)),
        *(("test", "some/name", 1), ("test", "other/name", 1)),
    ]
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]})
    assert [len(pieces[place].selected(rows, seed=0)) for place in (0, 1)] == [1, 3]
    assert len(Piece("train", "some/name", "train", 0.01).selected(rows, seed=0)) == 1  # never none


def test_rows_are_in_the_order_of_datasets():
    from datasets import Dataset

    from spin.alignment.data.mixture import Piece, shuffled

    rows = Dataset.from_dict({"row": range(100)})
    assert shuffled(100, 7).tolist() == rows.shuffle(seed=7)["row"][:]
    piece = Piece("train", "x", "train", 0.3)
    assert piece.selected(rows, 7)["row"][:] == rows.shuffle(seed=7)["row"][:30]
