"""Gathering in record batches: pairings, dropping, columns, waiting for late fractions, interruptions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.lock import folder_lock
from spin.alignment.data.fractions import fraction_path
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.rows import GENERATED_SCHEMA
from spin.alignment.methods.pairings import PAIRINGS, EveryRow
from spin.alignment.pairs.counts import read_counts
from spin.alignment.pairs.preference_files import Selection, last_turns
from tests.helpers import REPOSITORY, hear_ctrl_c, program_environment
from tests.helpers.gathering import (
    LOGPROBS,
    NUM_FRACTIONS,
    content,
    gather,
    one,
    own_prompts,
    record,
    refusal,
    row,
    write,
    write_whole,
)


def plain(rows):
    """ground_truth as a plain function: gathering cannot know that it keeps the rows, and goes prompt by prompt."""
    return [dict(item) for item in rows]


def write_varied(folder: Path, num_samples: int = 2) -> Path:
    """Whole fractions whose responses are equal, cut, empty, of several turns or padded with any white space."""
    chance = random.Random(0)
    texts = ["right", " right\n", "\u2003right\x1f", "wrong", "", "Ünï\u00a0", "right\u200b"]
    for number in range(NUM_FRACTIONS):
        rows = []
        for prompt in own_prompts(number):
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}] * chance.randrange(3)
            turns.append({"role": "user", "content": f"{prompt}?"})
            for sample in range(num_samples):
                ours, theirs = ([*turns, {"role": "assistant", "content": chance.choice(texts)}] for _ in range(2))
                finish = chance.choice(["stop", "length"])
                rows.append(row(prompt, sample, chosen=ours, rejected=theirs, rejected_finish_reason=finish))
        write(folder, number, rows, record(number, num_samples))
    return folder


@pytest.mark.parametrize("identical", ["keep", "drop"])
@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_batches_and_single_prompts_give_the_same_files(tmp_path, monkeypatch, identical, truncated):
    folder = write_varied(tmp_path / "in")
    flags = ["--identical", identical, "--truncated", truncated, "--max_rows_per_file", 5]
    assert gather(folder, tmp_path / "fast", *flags)[0] == 0
    monkeypatch.setitem(PAIRINGS, "ground_truth", plain)
    assert gather(folder, tmp_path / "slow", *flags)[0] == 0
    assert content(tmp_path / "fast") == content(tmp_path / "slow")
    everything = [
        item
        for number in range(NUM_FRACTIONS)
        for item in pq.read_table(fraction_path(folder, "train", number)).to_pylist()
    ]
    same = [item["chosen"][-1]["content"].strip() == item["rejected"][-1]["content"].strip() for item in everything]
    cut = [item["rejected_finish_reason"] == "length" for item in everything]
    kept = [
        item for item, equal, long in zip(everything, same, cut, strict=True)
        if not (equal and identical == "drop") and not (long and truncated == "drop")
    ]  # fmt: skip
    counts = read_counts(tmp_path / "fast" / "train_prefs.counts.json")
    assert counts == {
        "rows": 12, "identical": sum(same), "truncated": sum(cut), "dropped": 12 - len(kept), "skipped": 0, "written": len(kept)
    }  # fmt: skip
    assert 0 < sum(same) < 12 and 0 < sum(cut) < 12
    assert load_preferences(str(tmp_path / "fast"), "train").to_list() == kept


def test_responses_are_compared_as_python_strips_them():
    characters = [chr(code) for code in range(0x3200)]
    rows = [
        row(0, index, rejected=[{"role": "assistant", "content": f"right{it}"}]) for index, it in enumerate(characters)
    ]
    batch = pa.RecordBatch.from_pylist(rows, GENERATED_SCHEMA)
    counts = dict.fromkeys(("rows", "identical", "truncated", "dropped"), 0)
    kept = Selection(PAIRINGS["ground_truth"], drop_identical=True).apply(batch, 1, counts)
    blank = [index for index, character in enumerate(characters) if not character.strip()]
    assert counts["identical"] == counts["dropped"] == len(blank) > 20
    assert set(kept.column("sample_index").to_pylist()).isdisjoint(blank)


def test_last_turns_of_a_slice_are_its_own():
    texts = ["a", "b", "c", "d"]
    rows = [row(0, 0, chosen=[{"role": "user", "content": "?"}] * index + [{"role": "assistant", "content": text}])
            for index, text in enumerate(texts)]  # fmt: skip
    batch = pa.RecordBatch.from_pylist(rows, GENERATED_SCHEMA)
    assert [turn["content"] for turn in last_turns(batch.slice(1, 2), "chosen").to_pylist()] == ["b", "c"]


@pytest.mark.parametrize(
    "broken", [[], None, [{"role": "assistant", "content": None}]], ids=["empty", "null", "no text"]
)
def test_a_conversation_without_an_end_is_named(tmp_path, broken):
    folder = write_whole(tmp_path / "in")
    write(folder, 1, [row(2, 0), row(3, 0, rejected=broken)], record(1))
    assert "'rejected' of prompt p3 does not end with a turn that has content" in refusal(folder, tmp_path / "out")


def test_only_ground_truth_keeps_its_rows_and_stays_a_plain_call():
    assert [key for key, pairing in PAIRINGS.items() if getattr(pairing, "keeps_rows", False)] == ["ground_truth"]
    rows = [row(0, 0), row(0, 1)]
    assert PAIRINGS["ground_truth"](rows) == rows == EveryRow(plain)(rows)


def test_a_plain_function_is_a_pairing_that_sees_one_prompt_at_a_time(tmp_path, monkeypatch):
    seen = []

    def last_but_not_of_p3(rows):
        seen.append([(item["prompt_id"], item["sample_index"]) for item in rows])
        return [] if rows[0]["prompt_id"] == "p3" else [rows[-1]]

    monkeypatch.setitem(PAIRINGS, "last", last_but_not_of_p3)
    folder = write_whole(tmp_path / "in", num_samples=3)
    code, _, errors = gather(folder, tmp_path / "out", "--pairing", "last")
    assert code == 0, errors
    assert seen == [[(f"p{prompt}", sample) for sample in range(3)] for prompt in range(6)]
    pairs = load_preferences(str(tmp_path / "out"), "train")
    assert list(zip(pairs["prompt_id"], pairs["sample_index"], strict=True)) == [
        (f"p{prompt}", 2) for prompt in (0, 1, 2, 4, 5)
    ]
    monkeypatch.setitem(PAIRINGS, "wide", lambda rows: [{**item, "margin": 1.0} for item in rows])
    code, _, errors = gather(folder, tmp_path / "wide", "--pairing", "wide")
    assert code == 2 and "the pairing returns the columns margin, which the rows do not have" in errors
    assert not content(tmp_path / "wide")


def write_with_logprobs(folder: Path, number: int) -> None:
    schema = pa.schema([LOGPROBS, *GENERATED_SCHEMA]).append(pa.field("reward_score", pa.float64()))
    rows = [
        row(prompt, 0, rejected_logprobs=[-0.5, -prompt], reward_score=prompt / 4) for prompt in own_prompts(number)
    ]
    write(folder, number, rows, record(number), schema=schema)


def test_further_columns_pass_through(tmp_path, monkeypatch):
    for number in range(NUM_FRACTIONS):
        write_with_logprobs(tmp_path / "in", number)
    assert gather(tmp_path / "in", tmp_path / "fast")[0] == 0
    monkeypatch.setitem(PAIRINGS, "ground_truth", plain)
    assert gather(tmp_path / "in", tmp_path / "slow")[0] == 0
    assert content(tmp_path / "fast") == content(tmp_path / "slow")
    pairs = pq.read_table(next((tmp_path / "fast").glob("train_prefs-*.parquet")))
    assert pairs.schema.field("rejected_logprobs").type == LOGPROBS.type
    assert pairs["rejected_logprobs"].to_pylist() == [[-0.5, -prompt] for prompt in range(6)]
    assert pairs["reward_score"].to_pylist() == [prompt / 4 for prompt in range(6)]


def test_columns_must_agree_in_all_but_their_order(tmp_path):
    folder = write_whole(tmp_path / "in")
    path = fraction_path(folder, "train", 2)
    table = pq.read_table(path)
    pq.write_table(table.select(table.column_names[::-1]), path)
    assert gather(folder, tmp_path / "out")[0] == 0
    assert load_preferences(str(tmp_path / "out"), "train")["prompt_id"] == [f"p{prompt}" for prompt in range(6)]
    write_with_logprobs(folder, 1)
    errors = refusal(folder, tmp_path / "other")
    assert "train-00000.parquet and train-00001.parquet" in errors
    assert "differ in the columns rejected_logprobs, reward_score" in errors
    write_whole(folder)
    pq.write_table(table.set_column(1, "sample_index", table["sample_index"].cast(pa.int64())), path)
    assert "train-00002.parquet: the column 'sample_index' is int64, not int32" in refusal(folder, tmp_path / "other")


def test_one_gathering_at_a_time_writes_a_folder(tmp_path):
    folder = write_whole(tmp_path / "in")
    with folder_lock(tmp_path / "out", setting="output_dir"):
        code, _, errors = gather(folder, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert code == 2
    assert f"out is in use by process {os.getpid()}: wait for it, or choose another output_dir" in errors
    assert gather(folder, tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("spin.alignment.pairs.convert.PROGRESS_SECONDS", 0.0)
    code, _, errors = gather(write_whole(tmp_path / "in"), tmp_path / "out")
    assert code == 0 and [line.split(" rows, ")[0] for line in errors.splitlines()] == ["2", "4", "6"]
    assert errors.splitlines()[0].endswith("rows/s (now train)")


# Waiting for fractions that are still being made.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_the_earlier_pairs_as_they_were(tmp_path, number):
    folder, out = write_whole(tmp_path / "in"), tmp_path / "out"
    assert gather(folder, out)[0] == 0
    before = content(out)
    fraction_path(folder, "train", 2).unlink()
    command = [
        "spin/convert_data.py",
        "--input_dir",
        folder,
        "--output_dir",
        out,
        "--wait",
        60,
        "--max_rows_per_file",
        2,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--overwrite"], cwd=REPOSITORY, env=program_environment(),
        stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (out / ".train_prefs-00001.part").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    finally:
        process.kill()
        process.communicate()
    now = content(out)
    if number == signal.SIGKILL:
        assert {name: now[name] for name in before} == before and len(now) > len(before)
    else:
        assert now == before
    one(folder, 2)()
    assert gather(folder, out, "--overwrite")[0] == 0
    assert content(out) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk gone"), MemoryError])
def test_a_failure_in_the_middle_leaves_the_earlier_pairs_as_they_were(tmp_path, monkeypatch, failure):
    folder, out = write_whole(tmp_path / "in"), tmp_path / "out"
    assert gather(folder, out)[0] == 0
    before = content(out)

    def pairing(rows):
        if rows[0]["prompt_id"] == "p3":
            raise failure
        return rows

    monkeypatch.setitem(PAIRINGS, "failing", pairing)
    code, _, _ = gather(folder, out, "--pairing", "failing", "--overwrite", "--max_rows_per_file", 1)
    assert code == (130 if failure is KeyboardInterrupt else 1) and content(out) == before
