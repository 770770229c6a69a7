"""Hub data sets: the configuration and the split that are read, and what is said of those that are missing."""

from __future__ import annotations

import datasets
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.source_files import read_records

PAIR = {"prompt": "2+3?", "chosen": "5", "rejected": "6"}


@pytest.fixture
def hub(monkeypatch):
    """Two data sets: one with configurations, one with preference splits of its own."""
    known = {
        "openai/gsm8k": {"main": ["train", "test"], "socratic": ["train"]},
        "org/binarized": {"default": ["train_sft", "train_prefs", "test_prefs"]},
    }

    def load_dataset(name, config, split, streaming):
        assert streaming and split in known[name][config]
        rows = [{**PAIR, "prompt": f"{config} {split} {row}"} for row in range(2)]
        return broken(rows) if split == "test_prefs" else rows

    def broken(rows):
        yield from rows
        raise ConnectionError("the line dropped\nand more")

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(known[name]))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: known[name][config])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def prompts(name, split):
    return [record["prompt"] for _, record in read_records(name, split)]


def test_configuration_and_split(hub):
    assert prompts("openai/gsm8k:main", "test") == ["main test 0", "main test 1"]
    assert prompts("openai/gsm8k:socratic", "train_prefs") == ["socratic train 0", "socratic train 1"]
    assert (
        prompts("org/binarized", "train_prefs")
        == prompts("org/binarized", "train")
        == prompts("org/binarized:default", "train")
    )
    assert load_preferences("org/binarized", "train_sft").num_rows == 2


@pytest.mark.parametrize(
    ("name", "split", "sentence"),
    [
        (
            "openai/gsm8k",
            "train",
            r"several configurations \(main, socratic\): name one as config, or as openai/gsm8k:main",
        ),
        ("openai/gsm8k:mian", "train", "no configuration 'mian' .*did you mean 'main'"),
        ("openai/gsm8k:main", "valid", r"no split 'valid' \(it has train, test\)"),
        ("org/binarized", "test", r"reachable Hub data set \(the line dropped\)"),
        ("org/unknown", "train", "neither a local file or folder nor a reachable Hub data set"),
    ],
)
def test_what_is_missing_is_named(hub, name, split, sentence):
    with pytest.raises(InputError, match=sentence):
        prompts(name, split)
