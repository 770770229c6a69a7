"""Leases and heartbeats: one owner at a time, takeover from the dead, no comparison of clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spin.alignment.core.machine import host_key
from spin.alignment.generation.leases import Leases, Worker, read_worker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    return tmp_path


def worker(folder: Path, beat: float = 0.05) -> Worker:
    return Worker(folder / "workers", beat)


def foreign_worker(folder: Path, name: str = "far-1", **facts: object) -> Path:
    """The heartbeat of a worker on another machine, whose process nobody here can look at."""
    record = {"worker": name, "host": "far", "pid": 1, "start": "1", "beat": 1, "state": "working", **facts}
    path = folder / "workers" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def held_by(folder: Path, name: str, block: str = "block") -> None:
    (folder / "claims" / f"{block}.lease").write_text(name)


def test_one_owner_at_a_time(folder):
    with worker(folder) as first, worker(folder) as second:
        ours, theirs = Leases(folder / "claims", first, 5), Leases(folder / "claims", second, 5)
        assert ours.claim("block") and ours.claim("block") and not theirs.claim("block")
        ours.release("block")
        assert theirs.claim("block") and not ours.claim("block")


def test_of_many_threads_that_claim_at_once_each_lease_goes_to_one(folder):
    with worker(folder) as first:
        workers = [worker(folder) for _ in range(8)]
        for other in workers:
            other.__enter__()
        wins: list[tuple[str, str]] = []

        def claim_all(claimer: Worker) -> None:
            mine = Leases(folder / "claims", claimer, 5)
            wins.extend((claimer.name, f"b{number}") for number in range(50) if mine.claim(f"b{number}"))

        threads = [threading.Thread(target=claim_all, args=(other,)) for other in [first, *workers]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for other in workers:
            other.__exit__()
    assert sorted(name for _, name in wins) == sorted(f"b{number}" for number in range(50))


def test_an_ended_worker_holds_nothing(folder):
    with worker(folder) as first:
        assert Leases(folder / "claims", first, 60).claim("block")
    assert read_worker(first.path)["state"] == "ended"
    with worker(folder) as second:
        assert Leases(folder / "claims", second, 60).claim("block")


def test_a_killed_worker_of_this_machine_is_known_at_once(folder):
    code = (
        "import sys, time; from pathlib import Path; from spin.alignment.generation.leases import Leases, Worker\n"
        "with Worker(Path(sys.argv[1]) / 'workers') as w:\n"
        "    Leases(Path(sys.argv[1]) / 'claims', w).claim('block'); print('ready', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    with worker(folder) as second:
        ours = Leases(folder / "claims", second, 600)
        assert not ours.claim("block")
        holder.kill()
        holder.wait()
        assert ours.claim("block")


@pytest.mark.parametrize("skew", [-86400, 0, 86400])
def test_a_far_worker_lives_while_its_heart_beats_whatever_its_clock_says(folder, skew):
    held_by(folder, "far-1")
    with worker(folder) as second:
        ours = Leases(folder / "claims", second, lease_timeout=0.4)
        for beat in range(12):  # three times as long as the lease_timeout
            path = foreign_worker(folder, beat=beat)
            os.utime(path, (time.time() + skew, time.time() + skew))
            assert not ours.claim("block")
            time.sleep(0.1)
        assert not ours.claim("block")
        time.sleep(0.5)
        assert ours.claim("block")


def test_a_far_worker_without_a_heartbeat_is_given_the_same_time(folder):
    held_by(folder, "far-1")
    held_by(folder, "", "just-created")
    with worker(folder) as second:
        ours = Leases(folder / "claims", second, lease_timeout=0.3)
        assert not ours.claim("block") and not ours.claim("just-created")
        time.sleep(0.4)
        assert ours.claim("block") and ours.claim("just-created")


def test_a_process_number_used_again_is_not_taken_for_the_dead_owner(folder):
    held_by(folder, "near-1")
    host = host_key()
    foreign_worker(folder, "near-1", host=host, pid=os.getpid(), start="an earlier process")
    with worker(folder) as second:
        assert Leases(folder / "claims", second, 600).claim("block")


def test_heartbeats_go_on_and_say_how_far_the_work_is(folder):
    with worker(folder, beat=0.02) as first:
        first.tell(rows=7)
        before = read_worker(first.path)["beat"]
        deadline = time.monotonic() + 10
        while (record := read_worker(first.path))["beat"] < before + 3 or "rows" not in record:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert record["rows"] == 7 and record["state"] == "working"


def test_a_lost_disk_does_not_end_the_heartbeat(folder):
    with worker(folder, beat=0.02) as first:
        (folder / "workers").rename(folder / "away")
        time.sleep(0.1)
        assert not (folder / "workers").exists()
        (folder / "away").rename(folder / "workers")
        before = read_worker(first.path)["beat"]
        deadline = time.monotonic() + 10
        while read_worker(first.path)["beat"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_damaged_lease_has_an_unknown_owner_who_gets_the_same_time(folder):
    with worker(folder) as mine:
        leases_ = Leases(folder / "claims", mine, lease_timeout=0.05)
        leases_.path("a").write_bytes(b"host-\xb1-3")
        assert not leases_.claim("a")
        time.sleep(0.1)
        assert leases_.claim("a")
