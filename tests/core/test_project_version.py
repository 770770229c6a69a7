"""The version by which machines are compared depends on the code, wherever it is installed."""

from __future__ import annotations

import shutil

import spin
from spin.alignment.core import project_version as module
from spin.alignment.core.assets import PACKAGE
from spin.alignment.core.project_version import difference, project_version


def test_the_code_decides_and_what_surrounds_it_does_not(tmp_path, monkeypatch):
    own, copy = project_version(), tmp_path / "spin"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "assets" / "scripts").mkdir(parents=True)  # of an installed package
    (copy / "assets" / "scripts" / "make.py").touch()
    (copy / ".#generate.py").symlink_to("/no/such")  # the lock of an editor
    monkeypatch.setattr(module, "PACKAGE", copy)
    assert own.startswith(f"{spin.__version__} (code ") and project_version() == own
    with (copy / "generate.py").open("a") as file:
        file.write("# another commit\n")
    assert project_version() != own
    assert difference(own, own) == "" and difference(project_version(), own).startswith(
        f"has selfplay-spin {spin.__version__}"
    )
