"""Gathering while late fractions are awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spin.alignment.data.fractions import fraction_path
from tests.helpers.gathering import (
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


class Later:
    """Does some things in order, a while apart, beside the test (a context manager)."""

    def __init__(self, *things: Callable[[], object], pause: float = 0.15) -> None:
        self.things, self.pause = things, pause
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        for thing in self.things:
            time.sleep(self.pause)
            thing()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What a gathering gives when all fractions of both splits are there from the start."""
    for split in ("train", "test"):
        for number in range(NUM_FRACTIONS):
            one(tmp_path / "all", number, split)()
    assert gather(tmp_path / "all", tmp_path / "whole")[0] == 0
    return tmp_path / "whole"


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 1, 2)])
def test_late_fractions_in_any_order_give_the_same_files(tmp_path, whole, order):
    folder = tmp_path / "in"
    folder.mkdir()
    things = [one(folder, number, split) for number, split in zip((*order, *order), ("train", "test") * 3, strict=True)]
    with Later(*things, pause=0.3):
        code, _, errors = gather(folder, tmp_path / "out", "--wait", 8, "--splits", "train", "test")
    assert code == 0, errors
    assert content(tmp_path / "out") == content(whole)
    lines = errors.splitlines()
    assert lines[0] == "waiting for the first test fraction; the first train fraction"
    assert any(
        line.startswith("waiting for ") and "train fraction " in line and line.endswith(" of 3") for line in lines
    )


def test_fractions_are_written_while_others_are_awaited(tmp_path, whole):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in (0, 1):
        one(folder, number)()
    found: set[str] = set()

    def watch() -> None:
        deadline = time.monotonic() + 20
        while ".train_prefs-00001.part" not in found and time.monotonic() < deadline:
            time.sleep(0.05)
            found.update(path.name for path in out.glob("*"))

    with Later(watch, one(folder, 2)):
        code, _, errors = gather(folder, out, "--wait", 25, "--max_rows_per_file", 2)
    assert code == 0 and "waiting for train fraction 2 of 3" in errors
    assert {".train_prefs-00000.part", ".train_prefs-00001.part"} <= found
    assert not [name for name in found if name.startswith("train_prefs")]


def test_waiting_ends_and_names_what_is_missing(tmp_path, whole):
    folder, out = tmp_path / "in", tmp_path / "out"
    one(folder, 1)()
    started = time.monotonic()
    errors = refusal(folder, out, "--wait", 0.5, "--splits", "train", "test")
    assert 0.5 <= time.monotonic() - started < 20
    assert "the first test fraction is missing; train fraction 0, 2 of 3 are missing" in errors
    assert (
        "after 0.5 s without a new one: run generate.py --split test; --split train with --data_frac 0 and --data_frac 2"
        in errors
    )
    one(folder, 2)()
    with Later(one(folder, 0)):
        assert gather(folder, out, "--wait", 8)[0] == 0
    before = content(out)
    fraction_path(folder, "train", 0).unlink()
    code, _, errors = gather(folder, out, "--wait", 0.3, "--overwrite")
    assert code == 2 and "train fraction 0 of 3 is missing" in errors and content(out) == before


def test_each_new_fraction_starts_the_waiting_anew(tmp_path, whole):
    folder = tmp_path / "in"
    one(folder, 0, "train")()
    with Later(one(folder, 2), one(folder, 1), pause=2.2):
        code, _, errors = gather(folder, tmp_path / "out", "--wait", 4)
    assert code == 0, errors


def test_a_fraction_still_being_copied_is_awaited(tmp_path):
    folder = write_whole(tmp_path / "in")
    path = fraction_path(folder, "train", 1)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    errors = refusal(folder, tmp_path / "out", "--wait", 0.3)
    assert (
        "train fraction 1 of 3 is missing" in errors and "train-00001.parquet is not a readable parquet file" in errors
    )
    with Later(lambda: path.write_bytes(good)):
        assert gather(folder, tmp_path / "out", "--wait", 8)[0] == 0


def test_a_copy_that_ended_is_no_longer_awaited(tmp_path):
    folder = write_whole(tmp_path / "in")
    good = {number: fraction_path(folder, "train", number).read_bytes() for number in (1, 2)}
    for number, whole_file in good.items():
        fraction_path(folder, "train", number).write_bytes(whole_file[:100])
    with Later(lambda: fraction_path(folder, "train", 2).write_bytes(good[2]), pause=0.3):
        errors = gather(folder, tmp_path / "out", "--wait", 2)[2].splitlines()
    assert errors[0] == "waiting for train fraction 1, 2 of 3" and errors[1] == "waiting for train fraction 1 of 3"
    assert "train-00001.parquet is not" in errors[2] and "train-00002" not in errors[2]


def test_a_late_fraction_of_another_run_is_refused(tmp_path):
    folder = write_whole(tmp_path / "in")
    fraction_path(folder, "train", 2).unlink()
    with Later(lambda: write(folder, 2, [row(4, 0), row(5, 0)], replace(record(2), model="n"))):
        assert "(model: 'm' != 'n')" in refusal(folder, tmp_path / "out", "--wait", 8)
    fraction_path(folder, "train", 2).unlink()
    other = replace(record(0), model="n", frac_len=0, num_prompts=1, extra={})
    with Later(lambda: write(folder, 0, [row(0, 0)], other, split="test")):
        assert "the splits test and train in" in refusal(
            folder, tmp_path / "out", "--wait", 8, "--splits", "train", "--splits", "test"
        )


def test_a_late_split_does_not_overwrite_pairs_of_something_else(tmp_path, whole):
    folder = tmp_path / "in"
    before = content(whole)
    late = [
        lambda number=number: write(folder, number, [row(prompt, 0) for prompt in own_prompts(number)],
                                    replace(record(number), prompts_hash="other"), split="test")
        for number in range(NUM_FRACTIONS)
    ]  # fmt: skip
    for number in range(NUM_FRACTIONS):
        one(folder, number)()
    with Later(*late):
        code, _, errors = gather(folder, whole, "--wait", 8, "--splits", "train", "test")
    assert content(whole) == before
    assert code == 2 and "was created from other inputs (prompts_hash: 'other' != 'h'" in errors


def test_flags_of_waiting(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    assert "contains no fraction files such as train-00000.parquet: pass --splits" in refusal(
        folder, tmp_path / "out", "--wait", 1
    )
    assert "wait is -1.0: set it to 0" in refusal(folder, tmp_path / "out", "--wait", -1)
    write_whole(folder)
    assert "the first dev fraction is missing" in refusal(folder, tmp_path / "out", "--splits", "train", "dev")
    one(folder, 0, "test")()
    assert gather(folder, tmp_path / "out", "--splits", "train")[0] == 0
    assert not list((tmp_path / "out").glob("test*"))


# Interruptions.
