"""What the field's tools write: save_to_disk folders, cloned repositories, configurations, and the split that is read."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.source_files import read_records, split_files
from spin.alignment.data.source_names import is_local, name_and_config, with_config

ROW = {"prompt": "2+3?", "response": "5"}


def table(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": text, "response": "5"} for text in texts])


def write(folder: Path, *names: str) -> Path:
    """Write one row into each file; its prompt is the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**ROW, "prompt": name}) + "\n")
    return folder


def prompts(source: object, split: str | None = "train") -> list[str]:
    return [record["prompt"] for _, record in read_records(str(source), split)]


def refusal(source: object, split: str | None = "train") -> str:
    with pytest.raises(InputError) as error:
        prompts(source, split)
    return str(error.value)


def test_saved_data_sets_are_read(tmp_path):
    table("a", "b").save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": table("a"), "test_prefs": table("b")}).save_to_disk(tmp_path / "many")
    assert prompts(tmp_path / "one") == prompts(tmp_path / "one", None) == ["a", "b"]
    assert (prompts(tmp_path / "many"), prompts(tmp_path / "many", "test")) == (["a"], ["b"])
    assert prompts(tmp_path / "many" / "train" / "data-00000-of-00001.arrow") == ["a"]
    assert "no file of the split 'test' (found data-00000" in refusal(tmp_path / "one", "test")
    assert "no file of the split 'valid' (found train (data-00000" in refusal(tmp_path / "many", "valid")
    assert "has no configurations: remove 'main'" in refusal(f"{tmp_path / 'many'}:main")


def test_the_split_of_a_saved_data_set_is_its_own(tmp_path):
    path = tmp_path / "rows.parquet"
    table("held out").to_parquet(path)
    loaded = datasets.load_dataset("parquet", data_files={"test": str(path)}, cache_dir=str(tmp_path / "cache"))
    loaded["test"].save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved", "test") == ["held out"]
    assert "no file of the split 'train'" in refusal(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("state.json", "{", "state.json is damaged"),
        ("state.json", "[" * 100_000, "state.json is damaged"),
        ("state.json", "[]", "state.json is not an object"),
        ("state.json", '{"_data_files": []}', "names no data files"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "lacks gone.arrow"),
        ("state.json", '{"_indices_data_files": [{"filename": "i"}]}', "stored by indices"),
        ("dataset_dict.json", '{"splits": []}', "names no splits"),
        ("dataset_dict.json", '{"splits": ["train"]}', "lacks the split 'train'"),
        ("data-00000-of-00001.arrow", "torn", "not a readable Arrow file"),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path, name, content, sentence):
    table("a").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content)
    assert sentence in refusal(tmp_path / "saved")


def test_metadata_beside_the_data_is_never_rows(tmp_path):
    write(tmp_path, "data/train-00000-of-00001.jsonl")
    for name in ("dataset_infos.json", "config.json", "train_prefs.counts.json"):
        (tmp_path / name).write_text('{"default": {}}')
    assert prompts(tmp_path) == prompts(tmp_path, None) == ["data/train-00000-of-00001.jsonl"]


def test_a_stray_file_beside_the_data_is_not_the_split(tmp_path):
    assert prompts(write(tmp_path, "predictions.jsonl", "data/train.jsonl")) == ["data/train.jsonl"]


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: "main/*.jsonl"}
  - split: test
    path: [held/out.jsonl, "held/more-*.jsonl"]
- config_name: socratic
  data_files: "socratic/*.jsonl"
- config_name: dicts
  data_files: {train: main/b.jsonl}
- config_name: folder
  data_dir: held
- config_name: absent
  data_files: {train: "nowhere/*.parquet"}
---
# A card
"""


def test_the_configurations_of_a_readme(tmp_path):
    write(tmp_path, "main/a.jsonl", "main/b.jsonl", "held/out.jsonl", "held/more-1.jsonl", "socratic/a.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert prompts(f"{tmp_path}:main") == ["main/a.jsonl", "main/b.jsonl"]
    assert prompts(f"{tmp_path}:main", "test") == ["held/out.jsonl", "held/more-1.jsonl"]
    assert prompts(f"{tmp_path}:socratic") == ["socratic/a.jsonl"]
    assert prompts(f"{tmp_path}:dicts") == ["main/b.jsonl"]
    assert prompts(f"{tmp_path}:folder", "out") == ["held/out.jsonl"]
    assert "several configurations (main, socratic, dicts, folder, absent): name one" in refusal(tmp_path)
    assert "no configuration 'mian' (it has main, socratic, dicts, folder, absent)" in refusal(f"{tmp_path}:mian")
    assert "name one of these; did you mean 'main'?" in refusal(f"{tmp_path}:mian")
    assert "lacks nowhere/*.parquet, which its README names for the split 'train'" in refusal(f"{tmp_path}:absent")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nconfigs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: default, data_files: b.jsonl}\n---", "b.jsonl"),
        ("---\nconfigs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: y, data_files: b.jsonl, default: true}\n---\n",
         "b.jsonl"),
        ("---\nconfigs: [x, y]\n---\n", "train.jsonl"),
        ("---\nlicense: mit\n---\n", "train.jsonl"),
        ("no metadata", "train.jsonl"),
        ("---\r\nconfigs:\r\n- {data_files: b.jsonl}\r\n---\r\n", "b.jsonl"),
    ],
)  # fmt: skip
def test_which_configuration_is_read_if_none_is_named(tmp_path, card, expected):
    write(tmp_path, "a.jsonl", "b.jsonl", "train.jsonl")
    (tmp_path / "README.md").write_bytes(card.encode())
    assert prompts(tmp_path) == [expected]


def test_metadata_that_is_not_yaml_is_named(tmp_path):
    (write(tmp_path, "train.jsonl") / "README.md").write_text("---\nconfigs: [\n---\n")
    assert "the metadata of" in refusal(tmp_path) and "README.md is not YAML" in refusal(tmp_path)


def test_configurations_and_splits_as_folders(tmp_path):
    write(tmp_path / "one", "main/train-00000-of-00001.jsonl")
    assert prompts(tmp_path / "one") == prompts(f"{tmp_path / 'one'}:main") == ["main/train-00000-of-00001.jsonl"]
    two = write(
        tmp_path / "two",
        "main/train/0000.jsonl",
        "main/train/0001.jsonl",
        "main/test/0000.jsonl",
        "socratic/train.jsonl",
    )
    assert prompts(f"{two}:main") == ["main/train/0000.jsonl", "main/train/0001.jsonl"]
    assert prompts(f"{two}:main", "test") == ["main/test/0000.jsonl"]
    assert "several configurations (main, socratic)" in refusal(two)
    assert prompts(write(tmp_path / "three", "default/train.jsonl", "other/train.jsonl")) == ["default/train.jsonl"]
    assert prompts(f"{write(tmp_path / 'four', 'data/main/train.jsonl', 'data/x/train.jsonl')}:x") == [
        "data/x/train.jsonl"
    ]
    assert "has no configuration 'main' (it has none)" in refusal(f"{write(tmp_path / 'five', 'train.jsonl')}:main")


def test_a_folder_that_is_named_like_a_file(tmp_path):
    write(tmp_path, "x.jsonl/part-00000-8c2f-c000.jsonl", "x.jsonl/part-00001-8c2f-c000.jsonl", "x.jsonl/_SUCCESS")
    assert len(prompts(tmp_path / "x.jsonl")) == 2
    write(tmp_path / "tables", "train.jsonl/part-00000-8c2f-c000.jsonl", "test.jsonl/part-00000-8c2f-c000.jsonl")
    assert prompts(tmp_path / "tables", "test") == ["test.jsonl/part-00000-8c2f-c000.jsonl"]
    (tmp_path / "empty.parquet").mkdir()
    assert "no data file" in refusal(tmp_path / "empty.parquet")


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "train.jsonl"), ("train_prefs", "train_prefs.jsonl"), ("test", "test_prefs.jsonl")],
)
def test_a_split_is_found_under_its_own_name_first(tmp_path, split, expected):
    assert prompts(write(tmp_path, "train.jsonl", "train_prefs.jsonl", "test_prefs.jsonl"), split) == [expected]


def test_a_file_and_its_compressed_copy_are_not_read_twice(tmp_path):
    write(tmp_path, "train.jsonl", "train.jsonl.gz")
    assert "'train' as .jsonl and .jsonl.gz files: remove one kind" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("train_00000_of_00002.jsonl", "train-00001-of-00002"),
        ("train.1-of-2.jsonl", "train-00000-of-00002"),
        ("train/00000-of-00002.jsonl", "00001-of-00002"),
    ],
)
def test_a_missing_file_of_a_numbered_set_is_named_however_it_is_numbered(tmp_path, name, missing):
    assert f"is missing {missing}" in refusal(write(tmp_path, name))


def test_a_numbered_set_with_all_of_its_files_is_read(tmp_path):
    assert len(prompts(write(tmp_path, "train_00000_of_00002.jsonl", "train_00001_of_00002.jsonl"))) == 2


@pytest.mark.parametrize("file", ["train.jsonl", "train-00000-of-00001.jsonl", "train.jsonl/part-00000.jsonl"])
def test_a_split_that_is_there_twice_is_refused(tmp_path, file):
    assert "contains the split 'train' twice" in refusal(write(tmp_path, file, "train/x.jsonl"))


def test_a_pointer_of_a_large_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "only a pointer to a large file: run 'git lfs pull'" in refusal(tmp_path)


def test_names_with_configurations(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert name_and_config(tmp_path / "a:b") == (str(tmp_path / "a:b"), None)
    assert name_and_config("openai/gsm8k:main") == ("openai/gsm8k", "main")
    assert name_and_config("./c:/d") == ("./c:/d", None)
    assert with_config(with_config("x", "main"), "main") == "x:main" and with_config("x", None) == "x"
    assert not is_local("x" * 5000) and not is_local("a\0b")
    assert "does not exist" in refusal("/" + "x" * 5000)


def test_a_file_has_no_configurations(tmp_path):
    path = write(tmp_path, "a.jsonl") / "a.jsonl"
    with pytest.raises(InputError, match="is a file and has no configurations: remove 'main'"):
        split_files(f"{path}:main", "train")
