"""``spin doctor``: what it says of packages, of Python, and of another package that is called spin too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spin.alignment.core.assets import PACKAGE
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline import doctor, doctor_imports, doctor_machine
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.doctor_imports import ImportChecks, ImportResult
from tests.helpers.runs import TRAINING, tiny_run, write_config


@pytest.fixture
def other_package(tmp_path) -> Path:
    """A folder with the distribution ``spin`` 0.19 of someone else, which has a module ``spin``."""
    site = tmp_path / "site"
    (site / "spin").mkdir(parents=True)
    (site / "spin" / "__init__.py").write_text('__version__ = "0.19"\n')
    (site / "spin-0.19.dist-info").mkdir()
    (site / "spin-0.19.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: spin\nVersion: 0.19\n")
    return site


def module_finding() -> doctor.Finding:
    return doctor.name_findings()[0]


def command_finding() -> doctor.Finding:
    return doctor.name_findings()[1]


def test_without_another_package_of_the_name():
    assert module_finding() == doctor.Finding("import spin", "ok", str(PACKAGE), needed=True)


def test_another_package_that_is_found_first(other_package, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(other_package))
    found = module_finding()
    assert (found.verdict, found.needed) == ("broken", True)
    assert found.detail.startswith(f"finds {other_package}/spin/__init__.py, which is not this project in {PACKAGE}:")
    assert found.detail.endswith("pip uninstall spin, then install selfplay-spin again")


def test_another_package_in_the_same_folder(other_package, monkeypatch):
    (other_package / "spin" / "__init__.py").unlink()
    (other_package / "spin").rmdir()
    (other_package / "spin").symlink_to(PACKAGE)
    monkeypatch.syspath_prepend(str(other_package))
    found = module_finding()
    assert (found.verdict, found.needed) == ("broken", True)
    assert "the package spin 0.19, a developer tool of the same name, has written its files into" in found.detail
    assert found.detail.endswith("pip uninstall spin selfplay-spin, then install selfplay-spin again")


def test_another_package_that_is_not_in_the_way(other_package, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(other_package)])
    found = module_finding()
    assert found.verdict == "ok" and found.detail.endswith("is installed elsewhere")


def test_the_command_of_another_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_finding().verdict == "absent" and "python -m spin" in command_finding().detail
    script = tmp_path / "spin"
    script.write_text("#!/usr/bin/python\nfrom spin.__main__ import main\n")
    script.chmod(0o755)
    assert command_finding().verdict == "broken" and command_finding().detail.endswith("use the command selfplay-spin")
    script.write_text("#!/usr/bin/python\nfrom spin.cli import entry_point\n")
    assert command_finding().verdict == "ok"


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 10, 9), "broken"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "broken")]
)
def test_python_must_be_one_that_the_dependencies_exist_for(monkeypatch, version, verdict):
    monkeypatch.setattr(sys, "version_info", version)
    found = doctor.python_finding()
    assert (found.what, found.verdict) == ("python", verdict)
    assert (verdict == "ok") or found.detail.endswith("use 3.11 to 3.13")


@pytest.mark.parametrize(
    ("checkout", "command"), [(True, "pip install -e '.[peft]'"), (False, "pip install 'selfplay-spin[peft]'")]
)
def test_how_to_install_what_is_absent(monkeypatch, checkout, command):
    monkeypatch.setattr(doctor, "is_checkout", lambda: checkout)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    absent, statements = doctor.optional_statements()
    details = {finding.what: finding.detail for finding in absent}
    assert not statements
    assert details["peft"] == f"for use_peft: {command}"
    assert details["flash_attn"] == "for attn_implementation: flash_attention_2"


def test_bounds_are_those_of_the_core_and_not_of_an_extra(monkeypatch):
    required = ["torch>=2.13.0,<2.15", 'torch==2.13.0; extra == "dev"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: required)
    assert doctor.pins() == {"torch": "<2.15,>=2.13.0"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.14.1+cpu" if name == "torch" else "1.0")
    findings = {finding.what: finding for finding in doctor.package_findings()}
    assert findings["torch"].verdict == "ok"
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.15.0")
    torch, *_ = doctor.package_findings()
    assert (
        torch.verdict == "broken" and torch.detail == "2.15.0, but <2.15,>=2.13.0 is what was tested: pip install -e ."
    )


def test_imports_are_checked_apart_and_told_as_they_end():
    statements = {
        "works": "print('2 GPUs'); print('1 CPU')",
        "fails": "import no_such_package",
        "aborts": "import os; os.abort()",
    }
    with ImportChecks(statements) as checks:
        results = {result.name: result for result in checks.results()}
    assert results["works"] == ImportResult("works", True, "2 GPUs; 1 CPU")
    assert results["fails"] == ImportResult("fails", False, "ModuleNotFoundError: No module named 'no_such_package'")
    assert results["aborts"] == ImportResult("aborts", False, "ended by SIGABRT")


def test_a_python_that_cannot_import_torch_is_the_result_of_every_check(monkeypatch):
    monkeypatch.setattr(doctor_imports, "_CHECKS", "import sys; sys.exit('libtorch is damaged')")
    with ImportChecks({"a": "", "b": ""}) as checks:
        results = list(checks.results())
    assert [(result.name, result.works) for result in results] == [("a", False), ("b", False)]
    assert "libtorch is damaged" in results[0].said


@pytest.mark.parametrize(
    ("status", "verdict", "said"),
    [(200, "ok", "logged in as me"), (401, "ok", "public models only"), (502, "absent", "502")],
)
def test_the_hub_is_asked(monkeypatch, status, verdict, said):
    answer = SimpleNamespace(status_code=status, json=lambda: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.utils.get_session", lambda: SimpleNamespace(get=lambda url, headers, timeout: answer)
    )
    found = doctor_machine.hub_finding()
    assert found.verdict == verdict and said in found.detail


def test_a_hub_that_does_not_answer_or_must_not_be_asked(monkeypatch):
    def lost(url, headers, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(get=lost))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = doctor_machine.hub_finding()
    assert found.verdict == "absent" and "does not answer (timed out)" in found.detail
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor_machine.hub_finding().verdict == "ok"


def test_the_disk_of_a_run_counts_optimizer_states(tmp_path, monkeypatch):
    values = tiny_run(tmp_path, iterations=2, train={**TRAINING, "optim": "adamw_torch"})
    config = write_config(tmp_path / "run.yaml", values)
    weights = doctor_machine.weights_of(load_run_config(config))
    need, said = doctor_machine.run_bytes(load_run_config(config))
    # Two trainings: a model of 4 bytes per weight, and two checkpoints (10 steps, every 5) with two states of 4 bytes as well.
    assert need == 2 * (4 * weights + 2 * (4 + 8) * weights) and "2 trainings" in said
    assert doctor_machine.run_disk(str(config)).endswith("with optimiser states")
    full = SimpleNamespace(free=need - 1)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: full)
    statement = f"{doctor._DISK}run_disk({str(config)!r})"
    with pytest.raises(InputError, match="with optimiser states: set save_total_limit: 1, or another run_dir"):
        exec(statement, {})


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, 3),
        ({"save_strategy": "no"}, 0),
        ({"num_train_epochs": 2, "save_total_limit": 1}, 1),
        ({"save_strategy": "steps", "save_steps": 0.25}, 4),
        ({"save_strategy": "steps", "save_steps": 3, "max_steps": 10}, 4),
    ],
)
def test_checkpoints_that_stay(values, kept):
    assert doctor_machine.checkpoints_kept(values) == kept
