"""``spin doctor``: what it says of packages, of Python, and of another package that is called spin too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spin.alignment.core.assets import PACKAGE
from spin.alignment.pipeline import doctor


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
    monkeypatch.setattr(doctor, "run_python", lambda *_: (True, ""))
    monkeypatch.setattr(sys, "version_info", version)
    found = doctor.machine_findings()[0]
    assert (found.what, found.verdict) == ("python", verdict)
    assert (verdict == "ok") or found.detail.endswith("use 3.11 to 3.13")


@pytest.mark.parametrize(
    ("checkout", "command"), [(True, "pip install -e '.[peft]'"), (False, "pip install 'selfplay-spin[peft]'")]
)
def test_how_to_install_what_is_absent(monkeypatch, checkout, command):
    monkeypatch.setattr(doctor, "is_checkout", lambda: checkout)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    details = {finding.what: finding.detail for finding in doctor.optional_findings()}
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
