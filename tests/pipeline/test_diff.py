"""`spin diff`: what matters first, iterations joined, hashes counted."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.core.files import write_json_atomic
from spin.alignment.pipeline.diff import differences, result_differences, sorted_differences
from spin.alignment.pipeline.manifest import RunManifest
from tests.helpers import run_main
from tests.helpers.evaluations import write_finished_run


def write_manifest(run_dir, beta: float, data: str, torch: str, made_in: str) -> None:
    def stage(**inputs):
        return {
            "state": "done",
            "inputs": {"seed": 1, **inputs},
            "inputs_hash": "",
            "outputs": {"iter0/x": {"hash": data, "size": 1, "mtime_ns": 1}},
        }

    stages = {
        f"iter{number}/train": stage(
            **{"beta": beta, f"dataset_mixer.{made_in}/iter0/pairs": 1.0, "content of RUN/iter0/pairs": data}
        )
        for number in range(3)
    }
    stages |= {"sft/train": stage(**{"content of data/iter0 train": data})}
    facts = {"environment": {"torch": torch}, "machine": {"cores": str(beta)}, "stages": stages}
    write_json_atomic(run_dir / "manifest.json", {"format": 1, **facts})


@pytest.fixture
def runs(tmp_path):
    """Two runs with reports that differ in beta, data, torch and what follows from them."""
    found = []
    for name, beta in (("one", 0.1), ("two", 0.2)):
        run_dir = write_finished_run(tmp_path / name)
        write_manifest(run_dir, beta, f"hash-{name}", f"2.{name}", str(run_dir))
        found.append(run_dir)
    return found


def test_differences_are_sorted_by_what_they_mean(runs):
    found = sorted_differences(differences(*map(RunManifest, runs)))
    # The mixer names a folder of each run: not a difference.
    assert found.settings == [("iter0-2/train", "beta", "0.1", "0.2")]
    assert found.data == [("sft/train", "content of data/iter0 train", "hash-one", "hash-two")]
    assert found.environment == [("environment", "torch", "2.one", "2.two"), ("machine", "cores", "0.1", "0.2")]
    assert len(found.derived) == 7  # an output of four stages, and the pairs that three of them read


def test_the_command_leads_with_results_and_folds_hashes(runs):
    assert result_differences(*runs) == []  # no report yet
    for run in runs:
        assert run_main(cli.main, "report", run)[0] == 0
    path = runs[1] / "summary.json"
    summary = json.loads(path.read_text())
    summary["rows"][-1]["nll"] = 0.25
    path.write_text(json.dumps(summary))
    code, out, err = run_main(cli.main, "diff", *runs)
    assert (code, err) == (0, "")
    headings = [line.strip() for line in out.splitlines() if line.strip() in ("results", "settings", "data and models")]
    assert headings == ["results", "settings", "data and models"]
    assert "7 outputs, or inputs that other stages wrote, differ in content (--all lists them)" in out
    assert out.count("│ iter1") == 1 and "iter0/x" not in out
    code, out, _ = run_main(cli.main, "diff", *runs, "--all")
    assert code == 0 and out.count("iter0/x") == 4
    code, out, _ = run_main(cli.main, "diff", runs[0], runs[0])
    assert code == 0 and out.startswith("no difference")


def test_iterations_that_are_not_in_a_row_are_listed():
    rows = [(f"iter{number}/train", "beta", "1", "2") for number in (0, 2)] + [("iter1/train", "beta", "1", "3")]
    assert sorted_differences(rows).settings == [("iter0,2/train", "beta", "1", "2"), ("iter1/train", "beta", "1", "3")]
