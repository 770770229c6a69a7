"""Kept scores: killed writers, several processes, damage."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.cache import ScoreCache, content_key
from tests.helpers import REPOSITORY, flipped, run_command

WRITER = """
import os, signal, sys
from spin.alignment.rewards.cache import ScoreCache
cache = ScoreCache(sys.argv[1], "reward_model", "w")
for number in range(50):
    cache.add({f"{sys.argv[2]}-{number}": number / 7})
    if sys.argv[2] == "killed" and number == 20:
        cache._file.write('["half')
        cache._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def write(folder, name):
    return run_command([sys.executable, "-c", WRITER, folder, name], timeout=60, PYTHONPATH=str(REPOSITORY))


def test_keys_tell_contents_apart():
    assert content_key((1, 2), None) == content_key([1, 2], None)
    keys = {content_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ((1, 2), (3,)), ((1,), (2, 3))]}
    assert len(keys) == 5


def test_numbers_come_back_exactly(tmp_path):
    values = {"a": 0.1 + 0.2, "b": -1e-300, "c": 3.0}
    cache = ScoreCache(str(tmp_path), "reward_model", "w")
    cache.add(values)
    again = ScoreCache(str(tmp_path), "reward_model", "w")
    assert {key: again[key] for key in values} == values and "d" not in again
    assert "a" not in ScoreCache(str(tmp_path), "reward_model", "other weights")
    assert "a" not in ScoreCache(str(tmp_path), "preference_model", "w")
    cache.close()
    cache.close()


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path):
    ScoreCache(str(tmp_path / "kept"), "reward_model", "w").add({})
    assert not (tmp_path / "kept").exists()
    unkept = ScoreCache(None, "reward_model", "w")
    unkept.add({"a": 1.0})
    assert "a" not in unkept


def test_a_killed_writer_loses_its_last_line_only(tmp_path):
    assert write(tmp_path, "killed").returncode == -9
    assert write(tmp_path, "whole").returncode == 0
    cache = ScoreCache(str(tmp_path), "reward_model", "w")
    assert all(f"killed-{number}" in cache for number in range(21)) and "killed-21" not in cache
    assert cache["whole-49"] == 7.0
    # Who writes next starts a file of its own, so the torn line stays the last of its file.
    cache.add({"more": 1.0})
    assert ScoreCache(str(tmp_path), "reward_model", "w")["more"] == 1.0


def test_processes_write_side_by_side(tmp_path):
    names = ["one", "two", "three"]
    with ThreadPoolExecutor(len(names)) as pool:
        assert [done.returncode for done in pool.map(lambda name: write(tmp_path, name), names)] == [0, 0, 0]
    cache = ScoreCache(str(tmp_path), "reward_model", "w")
    assert all(cache[f"{name}-{number}"] == number / 7 for name in names for number in range(50))


@pytest.mark.parametrize("line", ['["a"]', '["a", "b"]', "{", '["a", null]', "3", '["b", 1.0, 5]', '["b", 1.0, 5, 6]'])
def test_damage_is_named_and_scored_again(tmp_path, line, capsys):
    """A line without a checksum is one of an earlier version and still read."""
    ScoreCache(str(tmp_path), "reward_model", "w").add({"a": 1.0})
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_text(json.dumps(["a", 1.0]) + "\n" + line + "\n" + json.dumps(["c", 2.0]) + "\n")
    cache = ScoreCache(str(tmp_path), "reward_model", "w")
    assert (cache["a"], "b" in cache, cache["c"]) == (1.0, False, 2.0)
    assert capsys.readouterr().err == f"{path}: 1 entries are damaged and will be scored again\n"


def test_a_flipped_bit_is_never_a_score(tmp_path, capsys):
    """Every bit of the file in turn: the entry is as it was written, or it is left out (or ends the file) and scored again."""
    ScoreCache(str(tmp_path), "reward_model", "w").add({"aé": 0.25})
    (path,) = tmp_path.rglob("*.jsonl")
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        path.write_bytes(flipped(whole, place))
        cache = ScoreCache(str(tmp_path), "reward_model", "w")
        assert cache._values in ({}, {"aé": 0.25})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    cache = ScoreCache(str(tmp_path / "kept"), "reward_model", "w")
    (tmp_path / "kept").touch()
    with pytest.raises(InputError, match=r"cannot write scores to .*choose another score_cache"):
        cache.add({"a": 1.0})
