"""The card of a folder of pairs: what `datasets` and the Hub read of it, and that the programs here do not depend on it."""

from __future__ import annotations

import pyarrow as pa
import pytest

from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.data_card import write_data_card
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.rows import LABEL_TYPE, PREFERENCE_SCHEMA


def write_split(folder, split: str, files: int = 1) -> None:
    schema = pa.schema([*PREFERENCE_SCHEMA, ("chosen_score", LABEL_TYPE)])
    made = Provenance("preferences", model="/somewhere/iter0/checkpoint", weights_hash="abc", split=split, iteration=1)
    for number in range(files):
        path = folder / f"{split}_prefs-{number:05d}-of-{files:05d}.parquet"
        turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("a", "b")]
        row = {"prompt_id": f"{split}{number}", "sample_index": 0, "chosen": turns[0], "rejected": turns[1]}
        row |= {"rejected_token_ids": [1, 2], "rejected_finish_reason": "stop", "chosen_score": 1.0}
        with ParquetSink(path, schema, made) as sink:
            sink.write([row])


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path, "train", files=2)
    write_split(tmp_path, "test")
    (tmp_path / "train_prefs.counts.json").write_text('{"rows": 3}')
    write_data_card(tmp_path, {"train": {"rows": 3, "dropped": 1}, "test": {"rows": 1, "dropped": 0}})
    return tmp_path


def test_datasets_reads_the_splits_from_the_card(folder, tmp_path_factory):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    loaded = load_dataset(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))
    assert {name: len(rows) for name, rows in loaded.items()} == {"test": 1, "train": 2}
    card = DatasetCard.load(folder / "README.md")
    (config,) = card.data.configs
    assert config["data_files"][1] == {"split": "train", "path": ["train_prefs-[0-9]*.parquet"]}
    assert "| train | 2 | 2 | 3 | 1 |" in card.text
    assert "of `chosen`: a label" in card.text and "list of {role, content}" in card.text
    assert "model: iter0/checkpoint" in card.text and "/somewhere" not in card.text


def test_the_programs_go_by_the_files_and_not_by_the_card(folder):
    assert len(load_preferences(folder, "train")) == 2
    (folder / "test_prefs-00000-of-00001.parquet").unlink()  # the card still names it
    assert len(load_preferences(folder, "train_prefs")) == 2


def test_a_card_is_the_same_each_time_and_one_of_someone_else_is_kept(folder):
    first = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    write_data_card(folder, {"train": {"rows": 3, "dropped": 1}, "test": {"rows": 1, "dropped": 0}})
    assert (folder / "README.md").read_bytes() == first
    (folder / "README.md").write_text("# Mine\n")
    write_data_card(folder, {})
    assert (folder / "README.md").read_text() == "# Mine\n"
