"""The documentation: its links and anchors, what it says of commands and keys, and the site that is built from it."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.site.check_site import problems_of
from docs.site.links import anchors_of, links_of, resolve
from scripts.make_docs import CLASSES
from spin.alignment.core.settings import settings_of
from spin.alignment.methods.losses import LOSSES
from tests.helpers import REPOSITORY, run_command
from tests.helpers.browser import CHROMIUM, browser

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES += tuple(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))


def broken_links(name: str, text: str) -> list[str]:
    """Return the links of a Markdown file that lead to no file or to no heading."""
    broken = []
    for link in links_of(text):
        place = resolve(name, link)
        if place is None:
            continue
        path, anchor = REPOSITORY / place, (link["anchor"] or "").removeprefix("#")
        if place != name and not path.exists():
            broken.append(link[0])
        elif anchor and path.suffix == ".md":
            page = text if place == name else path.read_text(encoding="utf-8")
            broken += [link[0]] if anchor not in anchors_of(page) else []
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert broken_links(name, (REPOSITORY / name).read_text(encoding="utf-8")) == []


def test_broken_links_are_found_outside_of_code():
    text = "# A `b` c!\n\n[x](#a-b-c) [y](#none) `[z](none.md)` [w](../none.md)\n"
    text += "```\n# no heading\n[v](v.md)\n```\n[n](#no-heading)"
    assert broken_links("docs/index.md", text) == ["[y](#none)", "[w](../none.md)", "[n](#no-heading)"]
    assert anchors_of("# Same\n## Same\n### [Link](x.md) & `code.py`") == {"same", "same-1", "link--codepy"}


def test_every_page_is_in_the_navigation():
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r": (\w+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(name.removeprefix("docs/") for name in PAGES if name.startswith("docs/"))


def known_names() -> set[str]:
    """Every key and flag of the programs, and keys of transformers and TRL that they accept."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    for config_class in CLASSES.values():
        names |= set(settings_of(config_class))
    return names | {"extends", "scorer_model", "weigh"}


def test_what_other_tools_have_is_called_so_here():
    """Right-hand sides of the tables: every flag, key, loss and file exists."""
    names, text = known_names(), (REPOSITORY / "docs" / "coming_from.md").read_text(encoding="utf-8")
    cells = [cell for cell in re.findall(r"^\| .+? \| (.+) \|$", text, re.MULTILINE) if cell not in ("here", "---")]
    codes = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    assert len(codes) > 100
    for code in codes:
        path = re.match(r"(spin|scripts|configs)/[\w./]+", code)
        assert not path or (REPOSITORY / path[0]).exists(), code
        for flag in re.findall(r"--(\w+)", code):
            assert flag in names, code
        key = re.match(r"(\w+): ", code)
        assert not key or key[1] in names, code
        loss = re.match(r"loss_type: (\w+)$", code)
        assert not loss or loss[1] in LOSSES, code


def test_the_files_of_the_quick_start_are_read(tmp_path, monkeypatch):
    """Blocks that begin with the name of a file are what a reader saves."""
    from spin.alignment.methods.losses import find_loss
    from spin.alignment.pipeline.config import load_run_config
    from spin.alignment.rewards import find_scorer

    text = (REPOSITORY / "docs" / "quick_start.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == {"rewards.py", "online.yaml", "my_loss.py"}
    for name, content in blocks.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_run_config(tmp_path / "online.yaml")
    assert find_scorer(config.online["scorer"])("", "7", "") == 1.0
    assert find_loss("my_loss:exponential") is not None


def test_what_is_wrong_with_a_site_is_named(tmp_path):
    (tmp_path / "a.html").write_text(
        '<script src="https://cdn.example/x.js"></script><h2 id="here"></h2><a href="#here"></a><a href="b.html#gone"></a>'
        '<img src="none.png"><a href="https://example.org/"></a>'
    )
    (tmp_path / "b.html").write_text("<h2 id='other'></h2>")
    (tmp_path / "s.css").write_text("@import '//fonts.example/a.css';")
    assert problems_of(tmp_path) == [
        "a.html loads https://cdn.example/x.js",
        "a.html links to b.html#gone: the page has no heading #gone",
        "a.html links to none.png: there is no such file",
        "s.css loads something from another host",
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as CI builds it."""
    if not all(find_spec(name) for name in ("mkdocs", "material", "latex2mathml")):
        pytest.skip("mkdocs-material or latex2mathml is not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    # This interpreter with its search path, which may contain more than its environment.
    paths = ":".join(path for path in sys.path if path)
    done = run_command(["bash", REPOSITORY / "scripts" / "docs.sh", folder], PYTHON=sys.executable, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_formulas_and_the_repositorys_files(site):
    methods = (site / "methods.html").read_text(encoding="utf-8")
    assert methods.count("<math") > 20 and 'arithmatex">\\' not in methods and "<!-- results" not in methods
    assert "zephyr-7b-sft-full" in (site / "repository/configs/zephyr_7b.yaml.html").read_text(encoding="utf-8")
    readme = (site / "repository/index.html").read_text(encoding="utf-8")
    assert 'src="../images/loop.svg"' in readme and "mermaid" not in readme


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_pages_ask_no_other_host_for_anything(site, tmp_path):
    with browser(tmp_path) as page:
        for name in ("index", "methods", "repository/index"):
            page.open(f"file://{site}/{name}.html")
            page.resize(390)
            assert page.run("document.documentElement.scrollWidth") <= 390, name
        assert [problem for problem in page.problems if "://" in problem and "file://" not in problem] == []
