"""The generated sections of the docs match the declared settings and the docstrings of the modules."""

from __future__ import annotations

import re

import pytest

from scripts.make_docs import CLASSES, MAP, PAGES, PREFIXES, TABLE, up_to_date
from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import declaration_of, settings_of
from spin.alignment.data.foreign_forms import FOREIGN_FORMS
from spin.alignment.data.formats import FORMATS
from tests.helpers import REPOSITORY


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_generated_section_is_stale(page):
    text = page.read_text(encoding="utf-8")
    assert up_to_date(text) == text, "run python scripts/make_docs.py"


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_has_a_sentence_and_stands_in_the_docs(name):
    written = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    tables = "\n".join(match.group(0) for match in TABLE.finditer(written))
    for key, field in settings_of(CLASSES[name]).items():
        assert declaration_of(field).help, key
        assert any(f"| `{prefix}{key}` |" in tables for prefix in ("", "--", *PREFIXES.values())), key


def test_a_changed_table_is_seen():
    page = "<!-- keys: LaunchConfig -->\nold\n<!-- end -->\n"
    assert "| `launch.num_processes` | 1 |" in up_to_date(page) and "old" not in up_to_date(page)
    with pytest.raises(InputError, match="unknown settings class 'NoConfig'"):
        up_to_date("<!-- keys: NoConfig -->\n<!-- end -->")


def test_every_module_is_in_the_map_with_a_sentence():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [match.group(1) for match in MAP.finditer(page)] == ["packages", "modules"]
    listed = set()
    for heading, table in re.findall(r"^### `(\S+)/`\n\n((?:\|.*\n)+)", page, re.MULTILINE):
        rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", table, re.MULTILINE)
        assert all(sentence.endswith((".", ":")) for _, sentence in rows), heading
        listed |= {f"{heading}/{name}" for name, _ in rows}
    files = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "spin").rglob("*.py")}
    inits = {"spin/__init__.py"} | {name for name in files if re.fullmatch(r"spin/alignment/(\w+/)?__init__.py", name)}
    assert listed == {name.removesuffix("__init__.py") for name in files - inits}


def test_every_input_format_is_in_the_docs():
    page = (REPOSITORY / "docs" / "data_format.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| columns \| format \|\n.*\n((?:\|.*\n)+)", page, re.MULTILINE)[0]
    rows = [set(re.findall(r"`(\w+)`", row)) for row in table.splitlines()]
    for columns in (*FORMATS, *FOREIGN_FORMS):
        assert any(set(columns) <= row for row in rows), columns
