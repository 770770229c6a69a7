"""One writer per folder: who is refused, what a killed holder leaves, and file systems that cannot lock."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.lock import LOCK_NAME, folder_lock, is_locked
from tests.helpers import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from spin.alignment.core.lock import folder_lock
with folder_lock(sys.argv[1], setting="run_dir"):
    Path(sys.argv[1], "ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=environment)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def test_second_process_is_told_who_holds_the_folder(tmp_path, holder):
    sentence = f"{tmp_path} is in use by process {holder.pid}: wait for it, or choose another run_dir"
    with pytest.raises(InputError, match=sentence), folder_lock(tmp_path, setting="run_dir"):
        pass
    assert is_locked(tmp_path)


def test_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists() and not is_locked(tmp_path)
    with folder_lock(tmp_path, setting="run_dir"):
        assert (tmp_path / LOCK_NAME).read_text().strip() == str(os.getpid())
    assert not (tmp_path / LOCK_NAME).exists()


def test_lock_is_released_after_an_error_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "new", setting="output_dir"):
            raise ZeroDivisionError
    assert not is_locked(tmp_path / "new") and list((tmp_path / "new").iterdir()) == []


def test_holder_that_has_not_yet_written_who_it_is(tmp_path):
    with folder_lock(tmp_path, setting="run_dir"):
        (tmp_path / LOCK_NAME).write_text("")
        with pytest.raises(InputError, match="in use by another process"), folder_lock(tmp_path, setting="run_dir"):
            pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_be_locked_is_one_sentence(tmp_path, monkeypatch, number):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    if number in (errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", refuse)
    else:
        monkeypatch.setattr("spin.alignment.core.lock.Path.mkdir", refuse)
    sentence = (
        rf"cannot lock .*\({os.strerror(number)}\): choose another output_dir, on a disk that can be written and locked"
    )
    with pytest.raises(InputError, match=sentence), folder_lock(tmp_path / "out", setting="output_dir"):
        pass


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"cannot lock .*out"), folder_lock(tmp_path / "out", setting="output_dir"):
        pass


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_flock_is_not_implemented_the_file_itself_is_the_lock(tmp_path, monkeypatch):
    def not_implemented(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    with folder_lock(tmp_path, setting="run_dir"):
        assert is_locked(tmp_path)
        with (
            pytest.raises(InputError, match=f"in use by process {os.getpid()}:"),
            folder_lock(tmp_path, setting="run_dir"),
        ):
            pass
    assert not is_locked(tmp_path) and list(tmp_path.iterdir()) == []
