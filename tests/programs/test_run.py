"""Two iterations through the real programs: undisturbed, and killed in each stage and started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spin import cli
from spin.alignment.core.files import read_json
from spin.alignment.core.machine import describe_machine
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.provenance import hash_weights
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.processes import orphans
from spin.alignment.pipeline.runner import Pipeline
from spin.alignment.pipeline.start_programs import PLAIN_STARTS_VARIABLE
from tests.helpers import REPOSITORY, program_environment, run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config
from tests.helpers.training import is_saved

pytestmark = pytest.mark.slow

# Many steps after the first checkpoint: a run killed there must not have finished in the moment the signal needs.
TRAIN = {**TRAINING, "max_steps": 30}
SFT = {**TRAINING, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}


def start(config: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spin", "run", str(config)]
    log = config.with_suffix(".log").open("ab")
    environment = program_environment(**environment)
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(config: Path, **environment: str) -> str:
    """Run to the end; return all that was said in this configuration's runs."""
    code = start(config, **environment).wait()
    said = config.with_suffix(".log").read_text()
    assert code == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run directory of two iterations with a start, a control and scores, nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    values = tiny_run(root, sft=SFT, control=SFT, train=TRAIN, launch={"parallel": True})
    finish(write_config(root / "config.yaml", values))
    return root / "run"


def test_layout_of_a_run(undisturbed):
    wanted = [
        "run.yaml",
        "manifest.json",
        "summary.json",
        "report.html",
        "report.md",
        "report.png",
        "sft/checkpoint/model.safetensors",
    ]
    wanted += ["control/checkpoint/model.safetensors", "sft/eval.json", "control/eval.json"]
    for iteration in ("iter0", "iter1"):
        files = ("generated/train-00001.parquet", "checkpoint/model.safetensors", "metrics.json", "eval.json")
        wanted += [f"{iteration}/{file}" for file in (*files, "pairs/train_prefs-00000-of-00001.parquet")]
    assert [path for path in wanted if not (undisturbed / path).is_file()] == []


def test_first_loss_is_ln_2_at_every_iteration(undisturbed):
    losses = [read_json(undisturbed / f"iter{t}" / "metrics.json")["first_loss"] for t in (0, 1)]
    assert losses == pytest.approx([0.693147, 0.693147], abs=1e-5)


def test_machine_and_memory_are_recorded(undisturbed):
    assert read_json(undisturbed / "manifest.json")["machine"] == describe_machine()
    peak = read_json(undisturbed / "iter1" / "metrics.json")["peak_memory"]["host"]
    assert 0.05 < peak < 100  # GiB
    assert "| iter1/train | done | " in (undisturbed / "report.md").read_text()
    assert f"{peak:.1f} GiB" in (undisturbed / "report.md").read_text()


def test_summary_has_a_row_for_every_model(undisturbed):
    rows = json.loads((undisturbed / "summary.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["sft", "sft_continued", "iter0", "iter1"]
    assert all({"greedy_exact", "sampled_exact", "nll", "mean_length"} <= set(row) for row in rows)
    assert all({"identical_rate", "reward_accuracy", "margin", "chosen_drift"} <= set(row) for row in rows[2:])


def test_second_iteration_is_played_by_the_first_and_trains_on_both(undisturbed):
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    (pairs,) = (undisturbed / "iter1" / "pairs").glob("*.parquet")
    assert read_provenance(open_parquet(pairs).schema_arrow, pairs).weights_hash == hash_weights(
        undisturbed / "iter0" / "checkpoint"
    )
    assert read_json(undisturbed / "iter1" / "metrics.json")["pairs"] == {"train": 48}


def test_nothing_is_left_to_do_and_the_run_is_valid(undisturbed):
    manifest = RunManifest(undisturbed)
    assert all(manifest.is_done(name) for name in manifest.stages) and len(manifest.stages) == 12
    code, out, _ = run_main(cli.main, "validate", undisturbed)
    assert (code, out.strip()) == (0, "12 stages checked, 0 problems")
    code, out, _ = run_main(cli.main, "status", undisturbed)
    assert code == 0 and out.count("done") == 12


def test_validate_and_status_notice_a_changed_checkpoint(undisturbed, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(undisturbed, copy)
    weights = copy / "iter0" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    code, out, _ = run_main(cli.main, "validate", copy)
    assert code == 2 and "iter0/train: iter0/checkpoint/model.safetensors was changed" in out
    assert "is damaged: it is not the file that was saved (SHA256SUMS)" in out
    (weights.parent / "SHA256SUMS").unlink()  # changed on purpose
    _, out, _ = run_main(cli.main, "validate", copy)
    assert "was generated by" in out  # iteration 1 was played by other weights
    assert "was changed or removed" in run_main(cli.main, "status", copy)[1].replace("\n", " ")


def kill_when(config: Path, condition: Callable[[], bool], with_children: bool) -> None:
    """Start the run, and kill -9 it (with its children: as a power cut would) as soon as a condition holds."""
    run = start(config)
    while not condition():
        assert run.poll() is None, config.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for pid in orphans(config.parent / "run") if with_children else ():
        os.kill(pid, signal.SIGKILL)


def is_running(run_dir: Path, stage: str) -> bool:
    path = run_dir / "manifest.json"
    return path.exists() and json.loads(path.read_text())["stages"].get(stage, {}).get("state") == "running"


def bytes_of(run_dir: Path, iterations: int) -> dict[str, bytes]:
    """The rows, pairs and models of a run: everything that the next stage reads."""
    patterns = ("generated/*.parquet", "pairs/*.parquet", "checkpoint/*.safetensors", "checkpoint/*config.json")
    folders = [run_dir / f"iter{number}" for number in range(iterations)]
    files = [
        path for folder in folders for pattern in (*patterns, "checkpoint/token*") for path in folder.glob(pattern)
    ]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def test_killed_in_each_stage_and_moved_and_run_again_ends_with_the_same_bytes(tmp_path, undisturbed):
    values = tiny_run(tmp_path, model=str(undisturbed / "sft" / "checkpoint"), train=TRAIN)
    values["data"] = {"train": values["data"]["train"]}  # no scores: they change no weight
    config, run_dir = write_config(tmp_path / "config.yaml", values), tmp_path / "run"
    parts = run_dir / "iter0" / "generated" / ".parts"
    kill_when(config, lambda: any(parts.glob("*/part-*.parquet")), with_children=False)
    kill_when(config, lambda: is_running(run_dir, "iter0/convert"), with_children=True)
    checkpoint = run_dir / "iter0" / "checkpoint"
    kill_when(config, lambda: is_saved(checkpoint / "checkpoint-5"), with_children=True)
    # The run is moved in the middle of a training, and everything is spelled in another way.
    run_dir, model, data = run_dir.rename(tmp_path / "2026-11-28 [moved]"), tmp_path / "start", tmp_path / "rows"
    model.symlink_to(undisturbed / "sft" / "checkpoint")
    data.symlink_to(values["data"]["train"])
    spelled = f"{os.path.relpath(run_dir, REPOSITORY)}/../{run_dir.name}/"
    config = write_config(
        tmp_path / "config.yaml", {**values, "run_dir": spelled, "model": str(model), "data": {"train": str(data)}}
    )
    said = finish(config, **{PLAIN_STARTS_VARIABLE: "1"})  # the other runs start their programs from a server
    assert said.count("==> iter0/generate: already complete") >= 2 and "==> iter0/train: resuming" in said
    resumed = [
        int(step) for step in re.findall(r"resuming from \S+/.* \[moved\]/iter0/checkpoint/checkpoint-(\d+)", said)
    ]
    assert len(resumed) == 1 and 5 <= resumed[0] < TRAIN["max_steps"]
    rows = [row["prompt_id"] for path in (run_dir / "iter0" / "generated").glob("*.parquet") for row in read_rows(path)]
    assert len(rows) == len(set(rows)) == 24
    ours, theirs = bytes_of(run_dir, 2), bytes_of(undisturbed, 2)
    assert len(ours) > 16 and ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_finished_run_may_be_moved_and_named_in_any_way(undisturbed, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    values = yaml.safe_load((undisturbed.parent / "config.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    relative = {name: os.path.relpath(values[name]) for name in ("model",)}
    relative["data"] = {name: os.path.relpath(path) + "/" for name, path in values["data"].items()}
    for spelling in (str(run_dir), "run", "./run/", "link", f"../{tmp_path.name}/run", "link/../run//"):
        config = write_config(tmp_path / "config.yaml", {**values, **relative, "run_dir": spelling})
        monkeypatch.setattr(Pipeline, "run", lambda line: None)
        monkeypatch.setattr("spin.alignment.report.write_report", lambda config: None)
        code, out, err = run_main(cli.main, "run", config)
        assert (code, err) == (0, "") and "iter1" in out, spelling
        code, out, _ = run_main(cli.main, "status", spelling)
        assert code == 0 and out.count("done") == 12, spelling


def test_changed_setting_is_refused_and_more_iterations_are_not(undisturbed):
    config = undisturbed.parent / "config.yaml"
    code, _, err = run_main(cli.main, "run", config, "--evaluate.limit=4")
    assert code == 2 and "limit: 6 -> 4" in err and "--rerun_changed" in err
    before = (undisturbed / "run.yaml").read_text()
    code, _, err = run_main(cli.main, "run", config, "--train.beta=0.7", "--iterations=3")
    assert code == 2 and "iter0/train" in err and (undisturbed / "run.yaml").read_text() == before


def test_diff_names_what_differs(undisturbed, tmp_path):
    copy = tmp_path / "other"
    copy.mkdir()
    for name in ("manifest.json", "run.yaml"):
        shutil.copy(undisturbed / name, copy / name)
    assert "no difference" in run_main(cli.main, "diff", undisturbed, copy)[1]
    manifest = RunManifest(copy)
    manifest.stages["iter0/train"].inputs["learning_rate"] = 0.5
    manifest.save()
    assert "learning_rate" in run_main(cli.main, "diff", undisturbed, copy)[1]
