"""The wheel is the product: what it holds, and that it works in an empty folder without the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import REPOSITORY, program_environment, run_command

SOURCES = (
    "spin",
    "configs",
    "data/instructions",
    "data/iter0",
    "scripts",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)


def files_under(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: a build leaves folders beside its sources. A module removed since is in its way."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = REPOSITORY / name, root / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    stale = root / "source" / "build" / "lib" / "spin" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = run_command([*command, "--wheel-dir", root / "dist", root / "source"])
    assert done.returncode == 0, done.stderr
    (made,) = (root / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel alone is installed into; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_what_is_needed_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read("selfplay_spin-0.1.0.dist-info/METADATA").decode())
        entry_points = archive.read("selfplay_spin-0.1.0.dist-info/entry_points.txt").decode()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"spin", "selfplay_spin-0.1.0.dist-info"}
    modules = {f"spin/{name}" for name in files_under(REPOSITORY / "spin")}
    templates = {
        f"spin/alignment/report/templates/{name}" for name in ("report.html.jinja", "page.js", "uplot/LICENSE")
    }
    assert {"spin/py.typed", *templates} < modules
    assets = {
        f"spin/assets/{name}/{path}"
        for name in ("configs", "data/instructions", "data/iter0", "scripts")
        for path in files_under(REPOSITORY / name)
    }
    assert {"spin/assets/configs/demo.yaml", "spin/assets/scripts/slurm/generate.sbatch"} < assets
    assert {name for name in names if name.startswith("spin/")} == modules | assets
    assert "selfplay_spin-0.1.0.dist-info/licenses/LICENSE" in names
    assert entry_points.split() == [
        *("[console_scripts]", "selfplay-spin", "=", "spin.cli:entry_point", "spin", "=", "spin.cli:entry_point")
    ]
    assert metadata["Requires-Python"] == ">=3.11,<3.14" and metadata["License"] == "Apache-2.0"
    assert metadata.get_payload().lstrip().startswith("# selfplay-spin")


def run_installed(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -P`` with the installed package in ``folder``, far from the repository."""
    environment = program_environment(PYTHONPATH=str(installed))
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_both_commands_are_installed(installed, tmp_path):
    for command in ("spin", "selfplay-spin"):
        done = run_installed(installed, tmp_path, installed / "bin" / command, "--help")
        assert done.returncode == 0 and done.stdout.startswith("usage: spin COMMAND"), done.stderr


def test_init_in_an_empty_folder(installed, tmp_path):
    done = run_installed(installed, tmp_path, "-m", "spin", "init", "demo")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "next: spin run demo.yaml"), done.stderr
    assert (tmp_path / "demo.yaml").read_bytes() == (REPOSITORY / "configs" / "demo.yaml").read_bytes()
    assert files_under(tmp_path / "data" / "iter0") == files_under(REPOSITORY / "data" / "iter0")
    # Every shipped file is found in the package, not in the repository.
    code = "from spin.alignment.core.assets import asset; print(asset('configs'))"
    where = run_installed(installed, tmp_path, "-c", code).stdout.strip()
    assert where == str(installed / "spin" / "assets" / "configs")


def test_pages_find_their_templates(installed, tmp_path):
    code = "from spin.alignment.report.weights_page import render_weights_page as r; print(r([], ['a fact']))"
    done = run_installed(installed, tmp_path, "-c", code)
    assert done.returncode == 0 and '<p class="quiet">a fact</p>' in done.stdout, done.stderr


def test_programs_start_by_file_and_by_name(installed, tmp_path):
    for program in ([installed / "spin" / "reformat.py"], ["-m", "spin.reformat"]):
        done = run_installed(installed, tmp_path, *program, "--help")
        assert done.returncode == 0 and "--output_dir" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_without_the_repository(installed, tmp_path):
    run_installed(installed, tmp_path, "-m", "spin", "init", "demo")
    train = tmp_path / "data" / "iter0" / "train.parquet"
    pq.write_table(pq.read_table(train).slice(0, 200), train)
    # Two steps of everything: the programs start from the package, their data lie in the folder.
    changes = ["--sft.max_steps=2", "--control=null", "--iterations=1", "--train.max_steps=2", "--data.test=''"]
    changes += ["--generate.max_new_tokens=4"]
    done = run_installed(installed, tmp_path, "-m", "spin", "run", "demo.yaml", *changes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "demo" / "iter0" / "checkpoint" / "model.safetensors").is_file()
