"""`spin run` under random signals, twice on one directory, and under a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.__main__ import reports
from tests.faults.plan import SHORT
from tests.faults.programs import contents, differing, make_run
from tests.helpers import REPOSITORY, program_environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", SHORT["signals"])
def test_a_run_that_is_interrupted_at_random_moments_ends_equal(tmp_path, kind):
    count = SHORT["signals"][kind]
    found = list(reports("run_storm", {"kind": kind, "count": count, "root": str(tmp_path), "seed": 0}))
    assert [report for report in found if report["wrong"]] == []
    assert sum(" to " in report["how"] for report in found) == count and found[-1]["how"] == "finished"


def start(config: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spin", "run", str(config)],
        cwd=REPOSITORY,
        env=program_environment(PYTHONPATH=environment.pop("PYTHONPATH", str(REPOSITORY)), **environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_runs_on_one_directory_and_clocks_that_jump(tmp_path):
    config = make_run(tmp_path, "offline")
    run_dir = tmp_path / "run"
    both = [start(config), start(config)]
    said = [process.communicate(timeout=600)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    assert "another" in said[codes.index(2)] and "Traceback" not in "".join(said)
    expected = contents(run_dir)

    # Files dated in the past or the future are still the same files: nothing is done again.
    for number, path in enumerate(sorted(run_dir.rglob("*"))):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    again = start(config)
    _, said = again.communicate(timeout=600)
    assert again.returncode == 0 and differing(contents(run_dir), expected) == [], said
    assert "iter0/train: done in" not in said

    shutil.rmtree(run_dir)
    jumping = start(config, PYTHONPATH=f"{REPOSITORY / 'tests' / 'faults' / 'jumping_clock'}:{REPOSITORY}")
    _, said = jumping.communicate(timeout=600)
    assert jumping.returncode == 0, said
    assert differing(contents(run_dir), expected) == []
