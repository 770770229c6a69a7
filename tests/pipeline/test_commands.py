"""The commands on run folders with unusual names and contents: spin status, diff, report and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from spin import cli
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.fractions import PARTS_FOLDER
from spin.alignment.evaluation.responses import SCHEMA
from spin.alignment.generation.leases import read_worker
from spin.alignment.pipeline.config import open_run
from spin.alignment.pipeline.doctor import Finding, show_findings
from spin.alignment.pipeline.runner import Pipeline
from spin.alignment.pipeline.stages import make_stages
from tests.helpers import run_main
from tests.helpers.runs import tiny_run, write_config

# Folder names that YAML would read as a date, numbers, nothing, truth values, a list, a mapping or a comment.
NAMES = [
    "2026-11-27",
    "007",
    "1e3",
    "null",
    "yes",
    "[a]",
    "{a: b}",
    "a: b",
    "#5",
    "'quoted'",
    "-5",
    "0x1F",
    "12:30:45",
    "*x",
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A folder with the run "run", whose stages have not been started."""
    root = tmp_path_factory.mktemp("planned")
    config = write_config(root / "config.yaml", tiny_run(root, iterations=1, overrides={}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run", lambda line: None)
        run_main(cli.main, "run", config)
    return root


def copy_run(planned: Path, target: Path) -> Path:
    """Copy what `spin run` writes at its start."""
    target.mkdir(parents=True)
    for name in ("manifest.json", "run.yaml"):
        (target / name).write_text((planned / "run" / name).read_text())
    return target


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_name_is_text(planned, tmp_path, monkeypatch, name):
    copy_run(planned, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given = f"./{name}" if name.startswith("-") else name
    assert open_run(given).run_dir == given
    code, out, err = run_main(cli.main, "status", given)
    assert (code, err) == (0, "") and name in out and out.count("pending") == 5


def test_diff_shows_markup_as_text(planned, tmp_path):
    left, right = (copy_run(planned, tmp_path / name) for name in ("[red]", "[/blue]"))
    for folder, stop in ((left, "[/INST]"), (right, "[INST] \x1b[31m :warning:")):
        record = {"state": "done", "inputs": {"stop": stop}, "inputs_hash": "", "outputs": {}}
        manifest = {"environment": {"[pkg]": stop}, "stages": {"iter0/generate": record}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = run_main(cli.main, "diff", left, right)
    assert (code, err) == (0, "")
    assert all(text in out for text in ("[/INST]", "[INST]", ":warning:", "[pkg]", "\\x1b[31m")) and "\x1b" not in out


def test_doctor_shows_markup_as_text(monkeypatch, capsys):
    findings = [Finding("[disk]", "broken", "cannot read [/home] :x:", needed=True)]
    monkeypatch.setattr("spin.alignment.pipeline.doctor.findings", lambda config: iter(findings))
    assert not show_findings()
    shown = capsys.readouterr().out
    assert "[disk]" in shown and "cannot read [/home] :x:" in shown


def test_the_lineage_shows_markup_as_text(capsys):
    from spin.alignment.core.console import show
    from spin.alignment.report.table import lineage_table, results_table

    show(lineage_table([("[/x]", "a", "[b]", ":+1:")]))
    show(results_table({"rows": [{"model": "[/x]"}]}))
    shown = capsys.readouterr().out
    assert shown.count("[/x]") == 2 and "[b]" in shown and ":+1:" in shown


@pytest.mark.parametrize("content", ["", "a: [", "[]", "run_dir: x", "\x00"])
def test_a_damaged_run_yaml_is_named_with_what_helps(planned, tmp_path, content):
    run = copy_run(planned, tmp_path / "run")
    (run / "run.yaml").write_text(content)
    for command in (["status", run], ["report", run], ["diff", run, run], ["validate", run]):
        code, _, err = run_main(cli.main, *command)
        assert code == 2 and len(err.splitlines()) == 1 and "run.yaml" in err
        assert "`spin run` with the configuration of this run writes run.yaml again and continues" in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stages": {"iter0/train": {}}}', "removed", "folder"])
def test_a_run_goes_on_without_its_manifest(planned, tmp_path, monkeypatch, content):
    run = copy_run(planned, tmp_path / "run")
    manifest, output = run / "manifest.json", run / "iter0" / "generated" / "train-00000.parquet"
    manifest.unlink()
    output.parent.mkdir(parents=True)
    output.write_text("rows")
    if content == "folder":
        manifest.mkdir()
    elif content != "removed":
        manifest.write_text(content)
    (run / ".lock").write_bytes(b"\xff\x00 not a number")
    (run / ".run.yaml.999999999-0123abcd.tmp").write_text("run_d")
    (run / "iter0" / ".train.yaml.999999999-0123abcd.tmp").write_text("mod")
    monkeypatch.setattr(Pipeline, "run", lambda line: None)
    monkeypatch.setattr("spin.alignment.report.write_report", lambda config: None)
    code, out, err = run_main(cli.main, "run", planned / "config.yaml", f"--run_dir={run}")
    assert (code, err) == (0, "") and json.loads(manifest.read_text())["stages"] == {}
    assert ("the old file is kept" in out) == (content != "removed")
    assert output.read_text() == "rows" and not list(run.rglob(".*"))


@pytest.mark.parametrize(
    "name", ["sft/eval.json", "iter0/metrics.json", "iter0/eval.json", "iter0/pairs/train_prefs.counts.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_damaged_results_are_named_by_the_report(planned, tmp_path, name, content):
    run = copy_run(planned, tmp_path / "run")
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text(content)
    code, _, err = run_main(cli.main, "report", run)
    assert (code, err) == (
        2,
        f"error: {run / name} is damaged: `spin run` with the configuration of this run makes it again\n",
    )


@pytest.mark.parametrize("content", ['{"metric": "exact_match"}', '{"metric": "a", "n": 1, "temperatures": []}'])
def test_results_that_lack_a_value_are_named_by_the_report(planned, tmp_path, content):
    run = copy_run(planned, tmp_path / "run")
    (run / "iter0").mkdir()
    (run / "iter0" / "eval.json").write_text(content)
    code, _, err = run_main(cli.main, "report", run)
    assert (
        code == 2 and f"the results of iter0 in {run / 'iter0'} are incomplete" in err and "run `spin run` again" in err
    )


@pytest.mark.parametrize("content", ["{}", "[]", '{"temperatures": 3, "n": 1}', "{"])
def test_damaged_results_are_a_problem_and_do_not_end_the_check(planned, tmp_path, content):
    config = open_run(str(copy_run(planned, tmp_path / "run")))
    stage = next(stage for stage in make_stages(config) if stage.name == "iter0/evaluate")
    result = Path(stage.configs[0].output_file)
    result.parent.mkdir(parents=True)
    result.write_text(content)
    with ParquetSink(result.with_suffix(".parquet"), SCHEMA, Provenance("evaluation")):
        pass
    (problem,) = stage.kind.problems(stage, config)
    assert str(result) in problem


def test_the_copy_of_the_metrics_is_made_again(planned, tmp_path):
    config = open_run(str(copy_run(planned, tmp_path / "run")))
    stage = next(stage for stage in make_stages(config) if stage.name == "iter0/train")
    checkpoint = tmp_path / "run" / "iter0" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metrics.json").write_text('{"steps": 4}')
    copy = tmp_path / "run" / "iter0" / "metrics.json"
    for damaged in (None, "", "[]"):
        if damaged is not None:
            copy.write_text(damaged)
        stage.kind.restore(stage)
        assert json.loads(copy.read_text()) == {"steps": 4}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"worker": 5, "pid": "x"}', '{"worker": "a", "pid": null}'])
def test_damaged_heartbeats_stop_no_status(tmp_path, content):
    workers = tmp_path / PARTS_FOLDER / "workers"
    workers.mkdir(parents=True)
    (workers / "a.json").write_text(content)
    (tmp_path / PARTS_FOLDER / "train-00000-16-abc").mkdir()
    assert read_worker(workers / "a.json") is None
    code, out, err = run_main(cli.main, "status", tmp_path)
    assert (code, err) == (0, "") and "0 prompts finished" in out


def test_a_configuration_of_the_user_in_the_folder_is_not_taken_for_a_run(planned, tmp_path):
    """`run_dir: .` next to a configuration that is itself named run.yaml."""
    values = yaml.safe_load((planned / "config.yaml").read_text())
    mine = write_config(tmp_path / "run.yaml", {**values, "run_dir": str(tmp_path)})
    before = mine.read_text()
    code, _, err = run_main(cli.main, "run", mine)
    assert code == 2 and "run.yaml" in err and mine.read_text() == before
