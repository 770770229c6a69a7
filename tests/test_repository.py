"""The files around the code: workflows, templates, images, the notebook and versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

import spin
from spin.alignment.core.config import load_yaml
from tests.helpers import REPOSITORY, program_environment

YAML_FILES = sorted([*(REPOSITORY / ".github").rglob("*.yml"), *(REPOSITORY / "configs").glob("*.yaml")])
NOTEBOOK = REPOSITORY / "notebooks" / "quick_start.ipynb"


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_files_are_mappings(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_workflow_runs_what_ci_runs():
    jobs = load_yaml(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]
    commands = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "bash .ci/run" in commands["tests"]
    assert {"ruff check .", "ruff format --check ."} <= set(commands["lint"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda p: p.name
)
def test_issue_forms_have_what_the_forms_need(path):
    form = load_yaml(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in fields}) == len(fields) > 0
    assert all(item["attributes"]["label"] for item in fields)


def test_the_dev_container_and_the_image_install_the_pinned_torch():
    pinned = re.search(r'"(torch==[\d.]+)"', (REPOSITORY / "setup.py").read_text())
    assert pinned is not None
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    assert pinned[1] in container["postCreateCommand"]
    image = (REPOSITORY / "Dockerfile").read_text()
    assert f"ARG TORCH={pinned[1].partition('==')[2]}\n" in image
    assert image.index("USER spin") < image.index("RUN python3 -m venv") and 'ENTRYPOINT ["spin"]' in image


def test_the_extras_of_the_image_exist():
    extras = re.search(r"ARG EXTRAS=(\S+)", (REPOSITORY / "Dockerfile").read_text())
    assert extras is not None
    setup = (REPOSITORY / "setup.py").read_text()
    assert all(f'    "{name}": [' in setup for name in extras[1].split(","))


def test_the_version_is_the_same_everywhere():
    setup = re.search(r'version="([\d.]+)"', (REPOSITORY / "setup.py").read_text())
    assert setup is not None and setup[1] == spin.__version__
    assert str(load_yaml(REPOSITORY / "CITATION.cff")["version"]) == spin.__version__


def test_the_changelog_has_the_sections_of_keep_a_changelog():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def notebook_code() -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_notebook_has_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Its cells in order, with fewer steps and prompts, as a program."""
    code = notebook_code()
    for long, short in (
        ("steps = 400", "steps = 4"),
        ("slice(0, 3000)", "slice(0, 60)"),
        ("max_steps=40", "max_steps=2"),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    code += "\n\nassert history and set(scores) == {'SFT', 'SPIN'}\n"
    environment = program_environment(MPLBACKEND="Agg", TMPDIR=str(tmp_path), PYTHONPATH=os.fspath(REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact match T=0" in done.stdout
