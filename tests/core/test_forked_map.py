"""A function applied in forked processes: order, errors, few items ahead, and no worker that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.forked_map import forked_map, in_lists


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_order_and_few_items_are_ahead(workers):
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(1, 41):
            read = number
            yield number

    found = []
    for result in forked_map(lambda item: (item, os.getpid()), items(), workers):
        found.append(result)
        assert read - len(found) <= 2 * workers
    assert [item for item, _ in found] == list(range(1, 41))
    assert (os.getpid() in {pid for _, pid in found}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_where_it_belongs(workers):
    def fails(item: int) -> int:
        if item == 3:
            raise InputError("row 3 is bad")
        return item

    found = []
    with pytest.raises(InputError, match="row 3 is bad"):
        for result in forked_map(fails, range(20), workers):
            found.append(result)
    assert found == [0, 1, 2]


def test_a_killed_worker_is_an_error():
    with pytest.raises(InputError, match="one of 2 worker processes was killed"):
        list(forked_map(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(5), 2))


def test_workers_use_no_threads_of_the_tokenizers(monkeypatch):
    # With threads, a tokenizer that was used before the fork would wait for ever for those that the fork did not copy.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert set(forked_map(lambda _: os.environ["TOKENIZERS_PARALLELISM"], range(3), 2)) == {"false"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # that nobody waits for
    except psutil.NoSuchProcess:
        return False


def test_workers_end_with_a_killed_parent(tmp_path):
    def work() -> None:
        def note(item: int) -> None:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.05)

        list(forked_map(note, range(1000), 2))

    parent = multiprocessing.get_context("fork").Process(target=work)
    parent.start()
    deadline = time.monotonic() + 20
    while len(pids := [int(path.name) for path in Path(tmp_path).iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_items_are_listed():
    assert list(in_lists(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(in_lists([], 2)) == []
