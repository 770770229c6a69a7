"""Step 1.5 through its program: fractions in, preference files out; counts, gaps, mixtures, kills."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from spin import convert_data
from spin.alignment.core.parquet import ParquetSink, open_parquet, read_rows
from spin.alignment.core.provenance import Provenance, read_provenance
from spin.alignment.data.fractions import fraction_path, fraction_rows
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.rows import GENERATED_SCHEMA
from spin.alignment.pairs.counts import read_counts
from tests.helpers import run_main, run_script

MADE = Provenance(
    "generated", model="m", split="train", prompts_hash="h", num_prompts=5, frac_len=2, sampling={"num_samples": 2}
)


def sample(prompt: int, index: int, rejected: str = "wrong", finish: str = "stop") -> dict:
    question = {"role": "user", "content": f"{prompt}?"}
    return {
        "prompt_id": f"p{prompt}",
        "sample_index": index,
        "chosen": [question, {"role": "assistant", "content": "right"}],
        "rejected": [question, {"role": "assistant", "content": rejected}],
        "rejected_token_ids": [prompt, index],
        "rejected_finish_reason": finish,
    }


def write_fraction(folder: Path, number: int, rows: list[dict], made: Provenance = MADE, skipped=()) -> Path:
    made = replace(made, data_frac=number)
    with ParquetSink(fraction_path(folder, made.split, number), GENERATED_SCHEMA, made, skipped) as sink:
        sink.write(rows)
    return sink.path


def fraction(number: int, made: Provenance = MADE) -> list[dict]:
    """Both samples of every prompt of a fraction; prompt 1 is answered right twice, prompt 2 is cut once."""
    rows = [
        sample(prompt, index) for prompt in fraction_rows(made.num_prompts, number, made.frac_len) for index in (0, 1)
    ]
    for row in rows:
        if row["prompt_id"] == "p1":
            row["rejected"][-1]["content"] = " right\n"
        if (row["prompt_id"], row["sample_index"]) == ("p2", 1):
            row["rejected_finish_reason"] = "length"
    return rows


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """Five prompts in fractions of two with two samples each, and a test split of one fraction."""
    folder = tmp_path / "generated"
    for number in range(3):
        write_fraction(folder, number, fraction(number))
    test = replace(MADE, split="test", prompts_hash="t", num_prompts=2, frac_len=0)
    write_fraction(folder, 0, [sample(prompt, index) for prompt in (0, 3) for index in (0, 1)], test)
    return folder


def run(folder: Path, out: Path, *flags: object) -> str:
    code, printed, errors = run_main(convert_data.main, "--input_dir", folder, "--output_dir", out, *flags)
    assert code == 0, errors
    return printed


def refused(folder: Path, out: Path, *flags: object) -> str:
    code, printed, errors = run_main(convert_data.main, "--input_dir", folder, "--output_dir", out, *flags)
    assert code == 2 and printed == "" and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_every_sample_becomes_one_pair_in_the_order_of_the_fractions(generated, tmp_path):
    printed = run(generated, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [
        "README.md",
        "test_prefs-00000-of-00001.parquet",
        "test_prefs.counts.json",
        "train_prefs-00000-of-00001.parquet",
        "train_prefs.counts.json",
    ]
    pairs = load_preferences(str(tmp_path / "out"), "train")
    assert pairs.to_list() == [row for number in range(3) for row in fraction(number)]
    assert len(load_preferences(str(tmp_path / "out"), "test")) == 4
    assert [line.split() for line in printed.splitlines()] == [
        ["split", "rows", "identical", "truncated", "dropped", "skipped", "written"],
        ["test", "4", "0", "0", "0", "0", "4"],
        ["train", "10", "2", "1", "0", "0", "10"],
    ]
    made = read_provenance(open_parquet(tmp_path / "out" / "train_prefs-00000-of-00001.parquet").schema_arrow, "")
    assert (made.kind, made.model, made.extra["fractions"]) == ("preferences", "m", 3)


def test_identical_and_cut_pairs_are_dropped_on_request_and_counted(generated, tmp_path):
    run(generated, tmp_path / "out", "--identical", "drop", "--truncated", "drop")
    counts = read_counts(tmp_path / "out" / "train_prefs.counts.json")
    assert counts == {"rows": 10, "identical": 2, "truncated": 1, "dropped": 3, "skipped": 0, "written": 7}
    kept = {(row["prompt_id"], row["sample_index"]) for row in load_preferences(str(tmp_path / "out"), "train")}
    assert kept == {(f"p{prompt}", index) for prompt in (0, 2, 3, 4) for index in (0, 1)} - {("p2", 1)}


@pytest.mark.parametrize(("limit", "sizes"), [(3, [3, 3, 3, 1]), (5, [5, 5]), (100, [10])])
def test_files_hold_at_most_the_rows_asked_for(generated, tmp_path, limit, sizes):
    run(generated, tmp_path / "out", "--max_rows_per_file", limit)
    files = sorted((tmp_path / "out").glob("train_prefs-*.parquet"))
    assert [len(list(read_rows(path))) for path in files] == sizes
    assert files[-1].name == f"train_prefs-{len(sizes) - 1:05d}-of-{len(sizes):05d}.parquet"


def test_prompts_that_generation_left_out_are_reported(generated, tmp_path):
    left = {"prompt_id": fraction(0)[0]["prompt_id"], "reason": "prompt of 900 tokens, at most 512 fit"}
    write_fraction(generated, 0, fraction(0)[2:], skipped=[left])
    printed = run(generated, tmp_path / "out")
    assert f"skipped by generation: {left['prompt_id']} (prompt of 900 tokens, at most 512 fit)" in printed
    assert read_counts(tmp_path / "out" / "train_prefs.counts.json")["skipped"] == 1


def test_a_rerun_is_free_and_pairs_of_something_else_are_refused(generated, tmp_path):
    out = tmp_path / "out"
    run(generated, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "already complete" in run(generated, out)
    counts = out / "train_prefs.counts.json"
    whole = counts.read_text()
    for damaged in ("{", "[]", "{}", whole.replace("written", "writteo")):
        counts.write_text(damaged)
        assert "already complete" not in run(generated, out)
        assert counts.read_text() == whole
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "extra.identical: 'drop' != 'keep'" in refused(generated, out, "--identical", "drop")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    run(generated, out, "--identical", "drop", "--overwrite", "--max_rows_per_file", 3)
    assert len(load_preferences(str(out), "train")) == 8 and len(list(out.glob("train_prefs-*"))) == 3
    fraction_path(generated, "test", 0).unlink()
    for number in range(3):
        write_fraction(generated, number, fraction(number), replace(MADE, model="n"))
    assert "test_prefs-00000-of-00002.parquet was created from other inputs (model: 'n' != 'm')" in refused(
        generated, out, "--overwrite"
    )


def test_damaged_counts_are_named_and_the_pairs_are_written_again(generated, tmp_path):
    out = tmp_path / "out"
    run(generated, out)
    whole = content(out)
    path = out / "train_prefs.counts.json"
    path.write_text(path.read_text().replace('"rows": 10', '"rows": 11'))
    code, _, said = run_main(convert_data.main, "--input_dir", generated, "--output_dir", out)
    assert code == 0 and f"{path} is damaged: the pairs are written again\n" in said
    assert content(out) == whole


def test_part_of_the_fractions_is_taken_on_request(generated, tmp_path):
    fraction_path(generated, "train", 2).unlink()
    run(generated, tmp_path / "out", "--num_fracs", 2)
    assert len(load_preferences(str(tmp_path / "out"), "train")) == 8


def gap(folder: Path) -> None:
    fraction_path(folder, "train", 1).unlink()


def two_gaps(folder: Path) -> None:
    gap(folder)
    fraction_path(folder, "train", 2).unlink()


def other_model(folder: Path) -> None:
    write_fraction(folder, 1, fraction(1), replace(MADE, model="n"))


def other_sampling(folder: Path) -> None:
    write_fraction(folder, 1, fraction(1), replace(MADE, sampling={"num_samples": 2, "temperature": 0.5}))


def other_test_model(folder: Path) -> None:
    test = replace(MADE, split="test", model="n", num_prompts=1, frac_len=0)
    write_fraction(folder, 0, [sample(0, 0), sample(0, 1)], test)


def other_kind(folder: Path) -> None:
    write_fraction(folder, 1, fraction(1), replace(MADE, kind="preferences"))


def repeated_sample(folder: Path) -> None:
    rows = fraction(1)
    write_fraction(folder, 1, [rows[0], rows[0], *rows[2:]])


def lost_prompt(folder: Path) -> None:
    write_fraction(folder, 1, fraction(1)[:2])


def repeated_fraction(folder: Path) -> None:
    write_fraction(folder, 1, fraction(0))


def no_provenance(folder: Path) -> None:
    import pyarrow.parquet as pq

    path = fraction_path(folder, "train", 1)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def torn(folder: Path) -> None:
    path = fraction_path(folder, "train", 1)
    path.write_bytes(path.read_bytes()[:-20])


def no_column(folder: Path) -> None:
    import pyarrow.parquet as pq

    path = fraction_path(folder, "train", 1)
    pq.write_table(pq.read_table(path).drop_columns(["rejected"]), path)


def all_identical(folder: Path) -> None:
    for number in range(3):
        write_fraction(folder, number, [{**row, "rejected": row["chosen"]} for row in fraction(number)])


def all_removed(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def nothing(folder: Path) -> None:
    pass


DEFECTS = {
    "gap": (gap, [], "train fraction 1 of 3 is missing in", "run generate.py --split train with --data_frac 1"),
    "gaps": (two_gaps, [], "train fraction 1, 2 of 3 are missing in", "--data_frac 1 and --data_frac 2"),
    "gap behind num_fracs": (two_gaps, ["--num_fracs", 2], "fraction 1 of 2 is missing", "--data_frac 1"),
    "too many asked": (nothing, ["--num_fracs", 4], "num_fracs is 4, but 5 prompts with frac_len 2 give 3 fractions", ""),
    "too few asked": (nothing, ["--num_fracs", 2], "contains more than 2 train fractions (train-00002.parquet)", ""),
    "model": (other_model, [], "train-00000.parquet and train-00001.parquet", "(model: 'm' != 'n')"),
    "sampling": (other_sampling, [], "come from different runs", "sampling.temperature: None != 0.5"),
    "model of test": (other_test_model, [], "the splits test and train", "(model: 'n' != 'm')"),
    "kind": (other_kind, [], "train-00001.parquet contains preferences rows, not generated ones", ""),
    "sample twice": (repeated_sample, [], f"contains the samples [0, 0] of prompt {fraction(1)[0]['prompt_id']}", ""),
    "prompt lost": (lost_prompt, [], "train-00001.parquet contains 1 prompts, but 2 are expected", ""),
    "prompt twice": (
        repeated_fraction, [], "appears more than once", "in train-00000.parquet and train-00001.parquet"),
    "no provenance": (no_provenance, [], "train-00001.parquet has no provenance", "generate it again"),
    "torn": (torn, [], "train-00001.parquet is not a readable parquet file", ""),
    "column": (no_column, [], "train-00001.parquet is missing the columns rejected", ""),
    "identical": (all_identical, ["--identical", "drop"], "no pair of the split 'train' remains (10 identical", ""),
    "empty folder": (all_removed, [], "contains no fraction files such as train-00000.parquet", "run spin/generate.py first"),
    "pairing": (nothing, ["--pairing", "best"], "unknown pairing 'best': choose one of best_vs_ground_truth, ", ""),
    "negative": (nothing, ["--num_fracs", -1], "num_fracs is -1: set it to 0 or more", ""),
    "no rows": (nothing, ["--max_rows_per_file", 0], "max_rows_per_file is 0: set it to 1 or more", ""),
    "choice": (nothing, ["--identical", "maybe"], "--identical is 'maybe': choose one of keep, drop", ""),
    "flag": (nothing, ["--pair", "x"], "unknown argument --pair; did you mean '--pairing'?", ""),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "flags", "message", "more"), DEFECTS.values(), ids=DEFECTS.keys())
def test_defects_are_named_and_nothing_is_written(generated, tmp_path, break_it, flags, message, more):
    break_it(generated)
    errors = refused(generated, tmp_path / "out", *flags)
    assert message in errors and more in errors
    assert not content(tmp_path / "out")


def test_bad_folders_are_named(generated, tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert "output_dir is the input_dir" in refused(generated, generated)
    (tmp_path / "file").touch()
    assert "is a file: choose a folder" in refused(generated, tmp_path / "file")


@pytest.mark.parametrize("survived", [0, 3, 4, 5, 6, 7, 8, 9])
def test_killed_anywhere_a_rerun_gives_the_same_and_no_reader_takes_half(generated, tmp_path, survived):
    """A kill -9 at the n-th rename: 4 hidden files, then 4 names with a count behind each split: 10 in all."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(generated, whole, "--max_rows_per_file", 4)
    killer = (
        "import os, sys; from pathlib import Path; from spin import convert_data\n"
        f"left = iter(range({survived}))\n"
        "def guarded(rename): return lambda *a: rename(*a) if next(left, None) is not None else os.kill(os.getpid(), 9)\n"
        "Path.replace, Path.rename = guarded(Path.replace), guarded(Path.rename)\n"
        "convert_data.main(sys.argv[1:])"
    )
    flags = ["--input_dir", generated, "--output_dir", out, "--max_rows_per_file", 4]
    assert run_script("-c", killer, *flags).returncode == -9
    for split, rows in (("train", 10), ("test", 4)):
        try:
            assert len(load_preferences(str(out), split)) == rows
        except ValueError as error:
            assert (
                "set is incomplete" in str(error)
                or "no file of the split" in str(error)
                or "no data file" in str(error)
            )
    run(generated, out, "--max_rows_per_file", 4)
    assert content(out) == content(whole)
    assert not [name for name in os.listdir(out) if name.startswith(".")]  # noqa: PTH208
