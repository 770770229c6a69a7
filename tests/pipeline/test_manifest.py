"""When a stage counts as done, what changed since, and who may work in a run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.lock import is_locked
from spin.alignment.pipeline.diff import differences
from spin.alignment.pipeline.lock import run_lock
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.processes import RUN_VARIABLE, orphans
from tests.helpers import REPOSITORY

INPUTS = {"beta": 0.1, "content of data": "abc"}


def finished(run_dir, name="iter0/convert", text="rows"):
    manifest = RunManifest(run_dir)
    output = run_dir / "pairs.parquet"
    manifest.start(name, INPUTS)
    output.write_text(text)
    manifest.finish(name, [output], 2.0)
    return output


def test_a_finished_stage_is_done_and_survives_a_new_process(tmp_path):
    finished(tmp_path)
    manifest = RunManifest(tmp_path)
    assert manifest.is_done("iter0/convert") and manifest.stages["iter0/convert"].seconds == 2.0
    assert not manifest.is_done("iter0/train")


def test_a_started_stage_is_not_done_even_when_its_output_is_there(tmp_path):
    manifest = RunManifest(tmp_path)
    (tmp_path / "pairs.parquet").write_text("rows")
    manifest.start("iter0/convert", INPUTS)
    assert not RunManifest(tmp_path).is_done("iter0/convert")


@pytest.mark.parametrize("harm", ["remove", "same length", "other length"])
def test_changed_or_missing_output_is_noticed(tmp_path, harm):
    output = finished(tmp_path)
    if harm == "remove":
        output.unlink()
    else:
        output.write_text("ROWS" if harm == "same length" else "more rows")
    manifest = RunManifest(tmp_path)
    assert not manifest.is_done("iter0/convert")
    assert manifest.damaged_outputs("iter0/convert") == ["pairs.parquet"]


def test_a_touched_file_is_hashed_again_and_still_done(tmp_path):
    output = finished(tmp_path)
    os.utime(output, (0, 0))
    assert RunManifest(tmp_path).is_done("iter0/convert")


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    finished(tmp_path)
    monkeypatch.setattr("spin.alignment.pipeline.manifest.hash_file", lambda path: pytest.fail(f"{path} was read"))
    assert RunManifest(tmp_path).is_done("iter0/convert")


def test_changes_name_the_key_and_both_values(tmp_path):
    finished(tmp_path)
    changes = RunManifest(tmp_path).changes("iter0/convert", {**INPUTS, "beta": 0.5, "new": 1})
    assert changes == ["beta: 0.1 -> 0.5", "new: absent -> 1"]


def test_seconds_add_up_over_restarts_of_the_same_stage(tmp_path):
    manifest = RunManifest(tmp_path)
    manifest.start("iter0/train", INPUTS)
    manifest.stop("iter0/train", 3.0)
    manifest.start("iter0/train", INPUTS)
    manifest.finish("iter0/train", [], 4.0)
    assert manifest.stages["iter0/train"].seconds == 7.0


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"stages": {"a": {"colour": 1}}, "environment": {}}')
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest"):
        RunManifest(tmp_path)


def test_diff_names_settings_outputs_and_missing_stages(tmp_path):
    for name, text in (("a", "rows"), ("b", "other")):
        (tmp_path / name).mkdir()
        finished(tmp_path / name, text=text)
    right = RunManifest(tmp_path / "b")
    right.stages["iter0/convert"].inputs["beta"] = 0.2
    right.start("iter0/train", INPUTS)
    rows = differences(RunManifest(tmp_path / "a"), right)
    assert [row[:2] for row in rows] == [
        ("iter0/convert", "beta"),
        ("iter0/convert output", "pairs.parquet"),
        ("iter0/train", "stage"),
    ]
    assert differences(right, right) == []


def test_second_run_in_one_directory_is_refused_by_name(tmp_path):
    with run_lock(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), run_lock(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_lock_of_a_killed_run_is_taken_over_and_its_children_are_ended(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from spin.alignment.pipeline.lock import run_lock\n"
        "with run_lock(sys.argv[1]):\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    Path(sys.argv[1], 'ready').touch()\n"
        "    time.sleep(60)\n"
    )
    # The mark that `spin run` gives its children is given to both here; only the child outlives the kill.
    environment = {**os.environ, RUN_VARIABLE: str(tmp_path.resolve()), "PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    while not (tmp_path / "ready").exists():
        assert holder.poll() is None
        time.sleep(0.02)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(orphans(tmp_path)) == 1
    with run_lock(tmp_path):
        assert orphans(tmp_path) == []
