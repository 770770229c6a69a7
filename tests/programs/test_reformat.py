"""Step 0 through its program: forms in, prompts out; subset, test split, repetition, bad input."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin import reformat
from spin.alignment.core.cards import front_matter, read_card
from spin.alignment.core.parquet import open_parquet, read_rows
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.rows import load_prompts
from tests.helpers import SHARED_DATA, run_main, run_script


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def questions(count: int) -> list[dict]:
    return [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(count)]


def asked(path: Path) -> list[str]:
    return [row["chosen"][0]["content"] for row in read_rows(path)]


def run(data: Path, out: Path, *flags: object) -> str:
    code, printed, errors = run_main(reformat.main, "--data", data, "--output_dir", out, *flags)
    assert code == 0, errors
    return printed


def test_rows_keep_their_order_and_carry_provenance(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", questions(5))
    assert "wrote 5 training and 0 test rows" in run(data, tmp_path / "out")
    assert asked(tmp_path / "out" / "train.parquet") == [f"{n}+{n}?" for n in range(5)]
    made = read_provenance(open_parquet(tmp_path / "out" / "train.parquet").schema_arrow, "")
    assert (made.kind, made.split) == ("prompts", "train")
    assert len(load_prompts(str(tmp_path / "out"), "train")) == 5


def test_split_and_subset_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = questions(200)
    first = write_lines(tmp_path / "a.jsonl", rows)
    second = write_lines(tmp_path / "b.jsonl", random.Random(0).sample(rows, len(rows)))
    for data, out in ((first, "one"), (second, "two")):
        run(data, tmp_path / out, "--test_size", 30, "--subset", 50)
    names = {
        name: [set(asked(tmp_path / out / f"{name}.parquet")) for out in ("one", "two")] for name in ("train", "test")
    }
    assert names["train"][0] == names["train"][1] and names["test"][0] == names["test"][1]
    assert (len(names["train"][0]), len(names["test"][0])) == (50, 30) and not names["train"][0] & names["test"][0]
    run(first, tmp_path / "three", "--test_size", 30, "--subset", 50, "--seed", 7)
    assert set(asked(tmp_path / "three" / "test.parquet")) != names["test"][0]


def test_repeated_prompts_are_counted_and_never_in_both_splits(tmp_path):
    rows = [{"question": f"{n % 20}?", "answer": str(n)} for n in range(60)]
    printed = run(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", "--test_size", 0.25)
    assert "60 rows read, 40 duplicate prompts removed" in printed and "wrote 15 training and 5 test rows" in printed
    kept = asked(tmp_path / "out" / "train.parquet") + asked(tmp_path / "out" / "test.parquet")
    assert sorted(kept) == sorted(f"{n}?" for n in range(20))
    answers = [row["chosen"][1]["content"] for row in read_rows(tmp_path / "out" / "train.parquet")]
    assert all(int(answer) < 20 for answer in answers), "the first of the repeated rows is kept"


def test_turns_of_one_conversation_stay_on_one_side(tmp_path):
    def conversation(number: int) -> dict:
        texts = [f"{number} first?", "one", "second?", "two", "third?", "three"]
        return {"id": f"c{number}", "messages": [
            {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
        ]}  # fmt: skip

    data = write_lines(tmp_path / "a.jsonl", [conversation(number) for number in range(20)])
    printed = run(data, tmp_path / "out", "--turns", "all", "--test_size", 7)
    assert "wrote 51 training and 9 test rows" in printed, "7 is rounded up to three whole conversations"
    ids = {
        split: {row["prompt_id"] for row in read_rows(tmp_path / "out" / f"{split}.parquet")}
        for split in ("train", "test")
    }
    assert len(ids["train"] | ids["test"]) == 60 and "c0#2" in ids["train"] | ids["test"]
    assert not {name.split("#")[0] for name in ids["train"]} & {name.split("#")[0] for name in ids["test"]}


def test_a_rerun_is_free_and_other_settings_are_refused(tmp_path):
    data, out = write_lines(tmp_path / "a.jsonl", questions(10)), tmp_path / "out"
    run(data, out, "--test_size", 2)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "already complete" in run(data, out, "--test_size", 2)
    code, _, errors = run_main(reformat.main, "--data", data, "--output_dir", out, "--test_size", 3)
    assert code == 2 and "sampling.test_size: 3.0 != 2.0" in errors and "--overwrite" in errors
    code, _, errors = run_main(reformat.main, "--data", data, "--output_dir", out)
    assert code == 2 and "held out from an earlier data set" in errors
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run(data, out, "--overwrite")
    assert sorted(path.name for path in out.glob("*.parquet")) == ["train.parquet"], (
        "a stale test split would be trained on"
    )
    assert [entry["split"] for entry in front_matter(read_card(out))["configs"][0]["data_files"]] == ["train"]


def test_an_official_test_split_stands_beside_the_training_split(tmp_path):
    write_lines(tmp_path / "train.jsonl", questions(10))
    write_lines(tmp_path / "test.jsonl", questions(3))
    for split, rows in (("train", 10), ("test", 3)):
        run(tmp_path, tmp_path / "out", "--split", split)
        assert len(asked(tmp_path / "out" / f"{split}.parquet")) == rows
    assert "already complete" in run(tmp_path, tmp_path / "out")


def test_skipping_invalid_rows_reports_them(tmp_path):
    rows = [*questions(3), {"question": "x", "answer": ""}]
    data = write_lines(tmp_path / "a.jsonl", rows)
    code, _, errors = run_main(reformat.main, "--data", data, "--output_dir", tmp_path / "out")
    assert code == 2 and "a.jsonl row 3 has an empty assistant turn" in errors and not (tmp_path / "out").exists()
    printed = run(data, tmp_path / "out", "--skip_invalid")
    assert "1 invalid rows skipped" in printed and "skipped: " in printed and "row 3" in printed


def test_a_killed_run_leaves_nothing_and_the_next_one_cleans_up(tmp_path):
    data, out = write_lines(tmp_path / "a.jsonl", questions(50)), tmp_path / "out"
    killer = (
        "import os, sys; from spin import reformat; from spin.alignment.core import files\n"
        "count = iter(range(9)); replace = files.Path.replace\n"
        "files.Path.replace = lambda *a: replace(*a) if next(count) == 0 else os.kill(os.getpid(), 9)\n"
        "reformat.main(sys.argv[1:])"
    )
    flags = ["--data", data, "--output_dir", out, "--test_size", 10]
    assert run_script("-c", killer, *flags).returncode == -9
    left = {path.name.split(".")[1] if path.name.startswith(".") else path.name for path in out.iterdir()}
    assert left == {"test.parquet", "train"}, "the test file, and the hidden training file"
    run(data, out, "--test_size", 10)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "test.parquet", "train.parquet"]


def test_the_card_names_the_splits_and_is_the_same_each_time(tmp_path):
    from datasets import load_dataset

    data = write_lines(tmp_path / "a.jsonl", questions(10))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "notes.parquet").write_text("not ours")
    for name in ("one", "two"):
        run(data, tmp_path / name, "--test_size", 3)
    card = read_card(tmp_path / "one")
    assert card == read_card(tmp_path / "two") and "| train | 1 | 7 |" in card and str(tmp_path) not in card
    found = load_dataset(str(tmp_path / "two"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 7, "test": 3}


def torn(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(questions(500)), folder / "torn.parquet", compression="none")
    content = bytearray((folder / "torn.parquet").read_bytes())
    content[4:200] = b"\xff" * 196
    (folder / "torn.parquet").write_bytes(content)
    return folder / "torn.parquet"


FLAGS = {
    "no data": ([], "the following arguments are required: --data"),
    "unknown flag": (["--data", "a.jsonl", "--subsett", "3"], "unknown argument --subsett; did you mean '--subset'?"),
    "not a number": (["--data", "a.jsonl", "--subset", "many"], "--subset is 'many', which is not a whole number"),
    "unknown turns": (["--data", "a.jsonl", "--turns", "first"], "--turns is 'first': choose one of last, all"),
    "negative subset": (["--data", "a.jsonl", "--subset", "-1"], "subset is -1: set it to 0 or more"),
    "negative test": (["--data", "a.jsonl", "--test_size", "-0.1"], "test_size is -0.1: set it to 0 or more"),
    "broken test size": (["--data", "a.jsonl", "--test_size", "2.5"], "give a whole number of rows, or a proportion below 1"),
    "test size no number": (["--data", "a.jsonl", "--test_size", "nan"], "test_size is nan: set it to 0 or more"),
    "all held out": (["--data", "a.jsonl", "--test_size", "10"], "leaves 0 for training and 10 for the test split"),
    "too much held out": (["--data", "a.jsonl", "--test_size", "11"], "leaves 0 for training and 11"),
    "none held out": (["--data", "a.jsonl", "--test_size", "0.01"], "leaves 10 for training and 0 for the test split"),
    "test of test": (["--data", "a.jsonl", "--split", "test", "--test_size", "2"], "cannot hold out a test split"),
    "missing file": (["--data", "b.jsonl"], "b.jsonl does not exist"),
    "missing data set": (["--data", "someone/something"], "nor a reachable Hub data set"),
    "missing split": (["--data", ".", "--split", "dev"], "no file of the split 'dev'"),
    "empty file": (["--data", "empty.jsonl"], "empty.jsonl contains no rows"),
    "shared id": (["--data", "ids.jsonl"], "ids.jsonl row 0: the id 'x' belongs to several different prompts"),
    "all invalid": (["--data", "bad.jsonl", "--skip_invalid"], "bad.jsonl has no usable row"),
    "damaged parquet": (["--data", "torn.parquet"], "torn.parquet is damaged"),
    "foreign output": (["--data", "a.jsonl", "--output_dir", "."], "train.parquet has no provenance"),
    "output is the input": (["--data", ".", "--output_dir", "."], "output_dir is the folder of the data"),
    "output is a file": (["--data", "a.jsonl", "--output_dir", "a.jsonl"], "is a file: choose a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS.keys())
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", questions(10))
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "ids.jsonl", [{"id": "x", **row} for row in questions(2)])
    write_lines(tmp_path / "bad.jsonl", [{"question": "", "answer": ""}])
    pq.write_table(pa.Table.from_pylist(questions(2)), "train.parquet")
    torn(tmp_path)
    before = sorted(os.walk(tmp_path))
    if "--output_dir" not in flags:
        flags = [*flags, "--output_dir", "out"]
    code, printed, errors = run_main(reformat.main, *flags)
    assert (code, printed) == (2, "") and message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert sorted(os.walk(tmp_path)) == before


def test_gsm8k_alpaca_and_sharegpt(tmp_path, gsm8k):
    run(gsm8k, tmp_path / "gsm8k", "--test_size", 200)
    sizes = [len(asked(tmp_path / "gsm8k" / f"{split}.parquet")) for split in ("train", "test")]
    assert sizes == [7273, 200]
    assert "14 duplicate prompts removed" in run(SHARED_DATA / "alpaca_demo", tmp_path / "alpaca")
    run(SHARED_DATA / "sharegpt_dummy", tmp_path / "sharegpt")
    (row, *_) = read_rows(tmp_path / "sharegpt" / "train.parquet")
    assert row["prompt_id"] == "identity_0" and [turn["role"] for turn in row["chosen"]] == ["user", "assistant"] * 2
