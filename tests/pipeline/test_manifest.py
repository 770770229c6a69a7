"""When a stage counts as done, what changed since, and who may work in a run directory."""

from __future__ import annotations

import json
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
from spin.alignment.pipeline.manifest import DamagedManifest, RunManifest, replaced_folder, set_damaged_aside
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


RECORD = {"state": "done", "inputs": {}, "inputs_hash": "", "outputs": {}}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is damaged"),
        ('{"stages": {', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("\udcff\udcfe", "is damaged"),
        ("[]", "is not a manifest"),
        ('{"environment": {}}', "is not a manifest"),
        ({"a": {"colour": 1}}, "has no valid record of a"),
        ({"a": 5}, "has no valid record of a"),
        ({"a": {**RECORD, "state": "perhaps"}}, "has no valid record of a"),
        ({"a": {**RECORD, "seconds": "two"}}, "has no valid record of a"),
        ({"a": {**RECORD, "outputs": {"x": {"hash": ""}}}}, "has no valid record of a"),
        ({"a": {**RECORD, "outputs": ["x"]}}, "has no valid record of a"),
    ],
)
def test_a_damaged_manifest_is_named_and_set_aside_by_a_run(tmp_path, content, fault, capsys):
    path = tmp_path / "manifest.json"
    text = content if isinstance(content, str) else json.dumps({"environment": {}, "stages": content})
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        DamagedManifest, match=rf"manifest\.json {fault}.*: `spin run` .* makes a new one and continues"
    ):
        RunManifest(tmp_path)
    set_damaged_aside(tmp_path)
    assert not path.exists() and RunManifest(tmp_path).stages == {}
    (kept,) = (tmp_path / "replaced").glob("*/manifest.json")
    assert kept.read_bytes() == text.encode(errors="surrogateescape") and str(kept) in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"format": 2}, {"stages": {"a": {**RECORD, "colour": 1}}}])
def test_the_manifest_of_a_later_version_is_left_alone(tmp_path, changes):
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"a": RECORD}, **changes}))
    with pytest.raises(InputError, match="was written by a later version"):
        set_damaged_aside(tmp_path)
    assert (tmp_path / "manifest.json").exists()


def test_a_folder_in_place_of_the_manifest_is_set_aside(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    set_damaged_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["replaced"]


def test_old_output_is_kept_apart_whatever_the_clock_shows(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    folders = [replaced_folder(tmp_path) for _ in range(3) if not replaced_folder(tmp_path).mkdir(parents=True)]
    assert [path.name for path in folders] == [f"20260101-000000-{n}" for n in (2, 3, 4)]


def inputs(model: str, data: str, model_hash: str = "m", data_hash: str = "d") -> dict[str, object]:
    """What a stage records of a model and of data, by their paths and their contents."""
    settings = {"model": model, f"dataset_mixer.{data}": 1.0, "input_dir": data, "beta": 0.1}
    return {**settings, f"content of {model}": model_hash, f"content of {data} train": data_hash}


@pytest.mark.parametrize("model", ["models/a", "/models/a/", "../models/a", "models/link"])
def test_another_spelling_of_the_same_content_is_no_change(tmp_path, model):
    manifest = RunManifest(tmp_path)
    manifest.start("a", inputs("./models/a", "/data"))
    assert manifest.changes("a", inputs(model, "data")) == []
    assert manifest.changes("a", inputs(model, "data", data_hash="x")) != []


def test_the_pairs_of_a_run_that_was_moved_are_the_same(tmp_path):
    """The keys of the mixer have the full path of the pairs."""
    manifest, pairs = RunManifest(tmp_path), {"content of RUN/iter0/pairs": "p", "output_dir": "RUN/iter0/checkpoint"}
    manifest.start("a", {"dataset_mixer./old/place/iter0/pairs": 1.0, **pairs})
    assert manifest.changes("a", {"dataset_mixer.../new/run/../run/iter0/pairs": 1.0, **pairs}) == []
    assert manifest.changes("a", {"dataset_mixer.../new/run/iter0/pairs": 0.5, **pairs}) != []
    assert (
        manifest.changes("a", {"dataset_mixer./old/place/iter0/pairs": 1.0, **pairs, "content of RUN/iter0/pairs": "q"})
        != []
    )


def test_changed_content_is_named_in_the_words_of_the_settings(tmp_path):
    manifest = RunManifest(tmp_path)
    manifest.start("a", inputs("models/a", "data"))
    assert manifest.changes("a", inputs("models/a", "data", model_hash="n")) == ["content of models/a: m -> n"]
    assert manifest.changes("a", {**inputs("models/a", "data"), "beta": 1.0}) == ["beta: 0.1 -> 1.0"]
    moved = manifest.changes("a", inputs("models/b", "data", model_hash="n"))
    assert moved == [
        "content of models/a: m -> absent",
        "content of models/b: absent -> n",
        "model: models/a -> models/b",
    ]


def test_two_sources_that_change_places_are_a_change(tmp_path):
    manifest = RunManifest(tmp_path)
    manifest.start("a", {"plus": "p", "minus": "q", "content of p": "1", "content of q": "2"})
    assert manifest.changes("a", {"plus": "q", "minus": "p", "content of p": "1", "content of q": "2"}) != []
    assert manifest.changes("a", {"plus": "P", "minus": "Q", "content of P": "1", "content of Q": "2"}) == []


def test_one_copy_less_of_the_same_data_is_a_change(tmp_path):
    manifest = RunManifest(tmp_path)
    two = {f"dataset_mixer.{name}": 1.0 for name in ("/a", "/b")} | {f"content of {name}": "x" for name in ("/a", "/b")}
    one = {"dataset_mixer./a": 1.0, "content of /a": "x"}
    manifest.start("a", two)
    assert manifest.changes("a", one) == ["content of /b: x -> absent", "dataset_mixer./b: 1.0 -> absent"]
    assert manifest.changes("a", two) == []


def test_an_unhashed_file_may_be_spelled_in_another_way(tmp_path):
    (tmp_path / "launch.yaml").touch()
    manifest = RunManifest(tmp_path)
    manifest.start("a", {"config_file": str(tmp_path / "launch.yaml")})
    assert manifest.changes("a", {"config_file": str(tmp_path / "." / ".." / tmp_path.name / "launch.yaml")}) == []
    assert manifest.changes("a", {"config_file": "other.yaml"}) != []


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
