"""The proof that fractions hold every prompt and sample once: whatever is moved, lost or repeated is refused and named."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spin.alignment.data.fractions import fraction_path
from spin.alignment.data.preferences import load_preferences
from spin.alignment.pairs.gather import Split
from tests.helpers.gathering import (
    FRAC_LEN,
    NUM_FRACTIONS,
    NUM_PROMPTS,
    Key,
    content,
    gather,
    id_sum,
    own_keys,
    own_prompts,
    record,
    refusal,
    row,
    write,
    write_keys,
    write_whole,
)


def is_sound(fractions: list[list[Key]], num_samples: int, keyed: bool) -> bool:
    """What must be accepted, said as plainly as possible. Without recorded sums nobody knows whose prompt is whose."""
    seen: list[int] = []
    for number, keys in enumerate(fractions):
        prompts = [prompt for prompt, _ in keys[::num_samples]]
        seen += prompts
        blocks = [keys[start : start + num_samples] for start in range(0, len(keys), num_samples)]
        for prompt, block in zip(prompts, blocks, strict=True):
            if sorted(block) != [(prompt, sample) for sample in range(num_samples)]:
                return False
        if len(prompts) != FRAC_LEN or (keyed and sorted(prompts) != own_prompts(number)):
            return False
    return len(seen) == len(set(seen))


def disturb(fractions: list[list[Key]], chance: random.Random) -> None:
    """Do one thing to one row, sample or prompt anywhere."""
    what = chance.choice(["remove", "repeat", "overwrite", "swap", "move", "swap files", "shuffle"])
    ours, theirs = (chance.choice([keys for keys in fractions if keys]) for _ in range(2))
    here, there = chance.randrange(len(ours)), chance.randrange(len(theirs))
    if what == "remove":
        ours.pop(here)
    elif what == "repeat":
        theirs.insert(there, ours[here])
    elif what == "overwrite":
        theirs[there] = ours[here]
    elif what == "swap":
        ours[here], theirs[there] = theirs[there], ours[here]
    elif what == "move":
        theirs.insert(there, ours.pop(here))
    elif what == "swap files":
        ours[:], theirs[:] = theirs[:], ours[:]
    else:
        chance.shuffle(ours)


@pytest.mark.parametrize("keyed", [True, False], ids=["with sums", "without sums"])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_exactly_the_sound_fractions_are_accepted(tmp_path, num_samples, keyed):
    chance, verdicts = random.Random(num_samples), set()
    for case in range(60):
        fractions = [own_keys(number, num_samples) for number in range(NUM_FRACTIONS)]
        for _ in range(chance.choice([1, 1, 2])):
            disturb(fractions, chance)
        folder, out = tmp_path / f"in{case}", tmp_path / f"out{case}"
        write_keys(folder, fractions, num_samples, keyed)
        code, _, errors = gather(folder, out)
        sound = is_sound(fractions, num_samples, keyed)
        verdicts.add(sound)
        assert code == (0 if sound else 2), (fractions, errors)
        if sound:
            pairs = [(pair["prompt_id"], pair["sample_index"]) for pair in load_preferences(str(out), "train")]
            assert pairs == [(f"p{prompt}", sample) for keys in fractions for prompt, sample in keys]
        else:
            assert not content(out) and ("train-0000" in errors or "prompt p" in errors), errors
    assert verdicts == {True, False}


def swapped(first: tuple[int, int], second: tuple[int, int], num_samples: int = 1) -> list[list[Key]]:
    """Whole fractions, except that two rows, each (fraction, row), have changed places."""
    fractions = [own_keys(number, num_samples) for number in range(NUM_FRACTIONS)]
    (one, here), (other, there) = first, second
    fractions[one][here], fractions[other][there] = fractions[other][there], fractions[one][here]
    return fractions


def with_fraction(number: int, keys: list[Key], num_samples: int = 1) -> list[list[Key]]:
    return [keys if index == number else own_keys(index, num_samples) for index in range(NUM_FRACTIONS)]


TWICE = "prompt p1 appears more than once, in train-00000.parquet and train-00002.parquet"
MOVED = "train-00000.parquet is missing prompt p1, which is in train-0000"
FAULTS = {
    "sample missing": (with_fraction(1, [(2, 0), (2, 1), (3, 1)], 2), 2, "00001.parquet contains the samples [1] of prompt p3"),
    "sample twice": (with_fraction(1, [(2, 0), (2, 0), (3, 0), (3, 1)], 2), 2, "contains the samples [0, 0] of prompt p2"),
    "apart": (with_fraction(1, [(2, 0), (3, 0), (2, 1), (3, 1)], 2), 2, "the 2 rows of prompt p2 in "),
    "prompt twice in a file": (with_fraction(2, [(4, 0), (4, 0)]), 1, "contains the samples [0, 0] of prompt p4"),
    "prompt in two files": (with_fraction(2, [(4, 0), (1, 0)]), 1, TWICE),
    "surplus prompt": (with_fraction(2, [(4, 0), (5, 0), (1, 0)]), 1, TWICE),
    "moved": ([[(0, 0)], [(2, 0), (3, 0), (1, 0)], [(4, 0), (5, 0)]], 1, MOVED + "1.parquet"),
    "changed places": (swapped((0, 1), (2, 0)), 1, MOVED + "2.parquet"),
    "lost": (with_fraction(1, [(3, 0)]), 1, "train-00001.parquet contains 1 prompts, but 2 are expected"),
    "not of the data": (with_fraction(1, [(2, 0), (99, 0)]), 1, "train-00001.parquet contains prompts that do not belong to its"),
    "one too many": (with_fraction(1, [(2, 0), (3, 0), (99, 0)]), 1, "contains 3 prompts, but 2 are expected"),
}  # fmt: skip


@pytest.mark.parametrize(("fractions", "num_samples", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_is_named(tmp_path, fractions, num_samples, message):
    write_keys(tmp_path / "in", fractions, num_samples)
    assert message in refusal(tmp_path / "in", tmp_path / "out")


def test_prompts_left_out_count_and_may_not_be_answered_as_well(tmp_path):
    folder = write_whole(tmp_path / "in")
    write(folder, 1, [row(2, 0)], record(1), skipped=["p3"])
    code, printed, errors = gather(folder, tmp_path / "out")
    assert code == 0 and "skipped by generation: p3 (too long)" in printed, errors
    write(folder, 1, [row(2, 0)], record(1), skipped=["p2"])
    assert "prompt p2 appears more than once, in train-00001.parquet: generate" in refusal(folder, tmp_path / "other")
    write(folder, 1, [row(2, 0)], record(1), skipped=["p99"])
    assert "contains prompts that do not belong to its fraction" in refusal(folder, tmp_path / "other")


def test_a_copied_fraction_is_known_by_its_record(tmp_path):
    folder = write_whole(tmp_path / "in")
    fraction_path(folder, "train", 1).write_bytes(fraction_path(folder, "train", 0).read_bytes())
    assert "train-00001.parquet records that it is fraction 0" in refusal(folder, tmp_path / "out")


def test_fractions_that_agree_with_themselves_must_make_up_the_data(tmp_path):
    folder = write_whole(tmp_path / "in")
    write(folder, 1, [row(0, 0), row(1, 0)], record(1, fraction_ids=id_sum([0, 1])))
    assert "prompt p0 appears more than once, in train-00000.parquet and train-00001.parquet" in refusal(
        folder, tmp_path / "out"
    )
    write(folder, 1, [row(2, 0), row(99, 0)], record(1, fraction_ids=id_sum([2, 99])))
    assert "do not contain the prompts of their data set" in refusal(folder, tmp_path / "out")
    write(folder, 1, [row(2, 0), row(3, 0)], record(1, all_ids="0" * 16))
    assert f"(extra.all_ids: {id_sum(range(NUM_PROMPTS))} != 0000000000000000)" in refusal(folder, tmp_path / "out")
    write(folder, 1, [row(2, 0), row(3, 0)], record(1, fraction_ids="12"))
    assert "records fraction_ids '12', not 16 hexadecimal digits" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("keyless", [0, 1])
def test_old_and_new_fractions_are_proven_together(tmp_path, keyless):
    folder = write_whole(tmp_path / "in")
    write(folder, keyless, [row(prompt, 0) for prompt in own_prompts(keyless)], record(keyless, keyed=False))
    assert gather(folder, tmp_path / "out")[0] == 0
    write(folder, keyless, [row(own_prompts(keyless)[0], 0), row(5, 0)], record(keyless, keyed=False))
    assert "prompt p5 appears more than once" in refusal(folder, tmp_path / "other")


def test_a_part_of_the_fractions_is_proven_without_the_rest(tmp_path):
    folder = write_whole(tmp_path / "in")
    fraction_path(folder, "train", 2).unlink()
    assert gather(folder, tmp_path / "out", "--num_fracs", 2)[0] == 0
    write(folder, 1, [row(2, 0), row(1, 0)], record(1, keyed=False))
    assert "prompt p1 appears more than once, in train-00000.parquet and train-00001.parquet" in refusal(
        folder, tmp_path / "other", "--num_fracs", 2
    )


def test_rows_without_an_id_are_refused(tmp_path):
    folder = write_whole(tmp_path / "in")
    write(folder, 1, [row(2, 0), row(3, 0, prompt_id=None)], record(1))
    assert "train-00001.parquet contains a row without prompt_id or sample_index" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("batch_rows", [1, 2, 7, 100])
@pytest.mark.parametrize("group_rows", [1, 4, 5, 100])
def test_batches_hold_whole_prompts_wherever_row_groups_end(tmp_path, monkeypatch, batch_rows, group_rows):
    monkeypatch.setattr("spin.alignment.pairs.fraction_file._BATCH_ROWS", batch_rows)
    folder = write_whole(tmp_path / "in", num_samples=3)
    path = fraction_path(folder, "train", 0)
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=group_rows)
    split = Split(folder, "train")
    split.survey()
    batches = list(split.read(split.take()))
    assert all(batch.num_rows % 3 == 0 for batch in batches)
    assert [line for batch in batches for line in batch.to_pylist()] == table.to_pylist()


def test_damage_behind_a_good_header_is_named(tmp_path):
    folder: Path = write_whole(tmp_path / "in")
    path = fraction_path(folder, "train", 1)
    whole = bytearray(path.read_bytes())
    whole[4:400] = bytes(396)
    path.write_bytes(whole)
    assert "train-00001.parquet is damaged" in refusal(folder, tmp_path / "out")
