"""Programs of a run that die, hang, outlive their launcher or their run, and logs that cannot be written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import RUN_VARIABLE, Interrupts
from spin.alignment.pipeline import processes
from spin.alignment.pipeline.processes import ChildPrograms, ProgramStalled, group_members
from spin.alignment.pipeline.runner import describe_code, explain
from spin.alignment.pipeline.stage_runner import StageFailed
from spin.alignment.pipeline.stalls import StalledProcess, StallWatch, culprits, process_state
from tests.helpers import REPOSITORY

FOLLOW = "from spin.alignment.core.program import follow_run; follow_run(); import os, sys, time\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(processes, "_STRAGGLER_SECONDS", 0.3)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def children_of(run_dir: Path, **settings) -> ChildPrograms:
    return ChildPrograms(run_dir, one_thread=True, prefix=False, **settings)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return process_state(pid) in ("", "Z")


# As the workers of accelerate, it has a session of its own.
SLEEP = "[sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True"
WORKER = f"import subprocess, sys, time; worker = subprocess.Popen({SLEEP}); "
WORKER += "print('worker', worker.pid, flush=True); "


def test_workers_of_a_launcher_that_was_killed_are_ended(tmp_path, capfd):
    """They hold the pipe of its output, so waiting for the end of the output would take as long as they live."""
    code = children_of(tmp_path).run("a/b", python(WORKER + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    said = capfd.readouterr().out
    assert code == -signal.SIGKILL and "1 of its processes have not: ending them" in said
    assert is_gone(int(re.search(r"worker (\d+)", said)[1]))
    assert describe_code(code) == "killed by SIGKILL, as the kernel does when memory runs out"


def test_a_helper_that_outlives_a_program_that_succeeded_is_ended_too(tmp_path, capfd):
    assert children_of(tmp_path).run("a/b", python(WORKER)) == 0
    assert is_gone(int(re.search(r"worker (\d+)", capfd.readouterr().out)[1]))


def test_a_hung_program_is_ended_and_described(tmp_path, capfd):
    hang = FOLLOW + "def stuck():\n    time.sleep(60)\nprint('step 7', flush=True)\nstuck()"
    with pytest.raises(ProgramStalled) as stalled:
        children_of(tmp_path, stall_timeout=1.0).run("a/b", python(hang))
    assert re.fullmatch(
        r"no output and no changed file for 1 s \(launch.stall_timeout\): process \d+ is at <string> line 3 in stuck; "
        r"its last line: step 7",
        str(stalled.value),
    )
    log = (tmp_path / "logs" / "a-b.log").read_text()
    assert "stack of process" in log and 'File "<string>", line 3 in stuck' in log
    failure = StageFailed("a/b", 1, tmp_path / "logs" / "a-b.log", str(stalled.value))
    assert explain(failure) == 1 and "a/b stopped: no output and no changed file" in capfd.readouterr().err


def test_the_rank_that_hangs_is_named(tmp_path):
    """Of two ranks, one is stopped and the other waits for it."""
    code = "import os, signal, subprocess, sys, time\n"
    code += "follow = sys.argv[1]\n"
    code += "def start(rank):\n    env = {**os.environ, 'RANK': str(rank)}\n"
    code += "    return subprocess.Popen([sys.executable, '-c', follow], env=env, start_new_session=True)\n"
    code += "ranks = [start(0), start(1)]\n"
    code += "time.sleep(0.5); ranks[1].send_signal(signal.SIGSTOP); ranks[0].wait()"
    children = children_of(tmp_path, stall_timeout=2.0)
    children.is_hurried = lambda: True
    with pytest.raises(ProgramStalled, match=r"rank 1 \(process \d+\) is stopped by a signal; its last line"):
        children.run("a/b", [*python(code), FOLLOW + "time.sleep(60)"])


def stalled(rank: str, stack: str, state: str = "S") -> StalledProcess:
    return StalledProcess(pid=1, rank=rank, state=state, stack=stack)


def test_ranks_that_wait_for_the_others_are_not_to_blame():
    waiting = 'File "/site/torch/distributed/distributed_c10d.py", line 5 in all_reduce\n'
    busy = 'Thread 0x1 (most recent call first):\n  File "/srv/data.py", line 9 in read'
    processes = [stalled("0", waiting), stalled("1", busy), stalled("2", waiting)]
    assert [item.description for item in culprits(processes)] == ["rank 1 (process 1) is at data.py line 9 in read"]
    assert [item.rank for item in culprits([stalled("0", waiting), stalled("1", waiting)])] == ["0", "1"]


def test_a_changed_file_is_progress_and_a_stopped_machine_no_stall(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch = StallWatch(60.0, tmp_path)

    def after(seconds: float) -> bool:
        for _ in range(int(seconds // 20)):
            clock[0] += 20
            found = watch.is_stalled()
        return found

    assert not after(40)
    (tmp_path / "rows").write_text("1")
    assert not after(60) and after(60)
    watch.note_output()
    assert not after(40)
    clock[0] += 10_000  # the laptop was closed
    assert not watch.is_stalled() and after(60)
    assert not StallWatch(0.0, tmp_path).is_stalled()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux signals children of a process that has ended")
def test_a_program_ends_with_the_run_that_started_it(tmp_path):
    child = FOLLOW + "print(os.getpid(), flush=True)\ntime.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    environment = {**os.environ, RUN_VARIABLE: str(tmp_path)}
    run = subprocess.Popen([*python(parent), child], env=environment, stdout=subprocess.PIPE)
    pid = int(run.stdout.readline())
    assert not is_gone(pid)
    run.kill()
    run.wait()
    run.stdout.close()
    wait_for(lambda: is_gone(pid))


def test_a_program_that_no_run_started_outlives_its_parent(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    monkeypatch.setattr(
        "spin.alignment.core.program.end_with_parent", lambda: pytest.fail("it would end with its shell")
    )
    from spin.alignment.core.program import follow_run

    follow_run()


def test_a_repeated_signal_kills_a_program_that_ignores_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("spin.alignment.core.program._CLEANUP_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    interrupts = Interrupts(exits_when_repeated=False)
    signal.signal(signal.SIGTERM, interrupts._handle)
    marker = tmp_path / "started"
    code = f"import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(marker)!r}, 'w').write('1'); "
    children = children_of(tmp_path)
    children.is_hurried = lambda: interrupts.is_repeated

    def terminate() -> None:
        wait_for(lambda: marker.exists() and marker.read_text())
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=terminate)
    started = time.monotonic()
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            children.run("a/b", python(code + "time.sleep(60)"))
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 15


def test_a_signal_that_is_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    others = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        Interrupts(exits_when_repeated=False).install()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in others:
            signal.signal(number, handler)


def test_a_full_disk_ends_the_log_and_not_the_stage(tmp_path, monkeypatch, capfd):
    children = children_of(tmp_path)
    monkeypatch.setattr(children, "log_path", lambda stage: Path("/dev/full"))
    assert children.run("a/b", python("print('one'); print('two')")) == 0
    said = capfd.readouterr()
    assert said.out == "one\ntwo\n"
    assert said.err == "warning: cannot write /dev/full (No space left on device): the run goes on without this log\n"


def test_a_log_that_cannot_be_created_is_one_sentence(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(InputError, match=r"cannot write .*a-b.log \(.*\): choose a folder you may write to"):
        children_of(tmp_path).run("a/b", python("pass"))


def test_bad_input_is_told_from_failures_by_the_last_words(tmp_path):
    children = children_of(tmp_path)
    assert children.run("a", python("import sys; print('error: no such row'); sys.exit(1)")) == 2
    assert children.run("a", python("import sys; sys.exit(1)")) == 1
    assert children.run("a", python("import os, signal; os.kill(os.getpid(), signal.SIGHUP)")) == 130


def test_group_members_are_those_of_one_session(tmp_path):
    other = subprocess.Popen(python("import time; time.sleep(60)"), start_new_session=True)
    assert group_members(other.pid) == [other.pid]
    other.kill()
    other.wait()
