"""Writes the tables of keys and flags in docs/*.md from the settings' own declarations.

    python scripts/make_docs.py          # after a setting was added or changed; a test fails when a table is stale

A table stands between ``<!-- keys: CLASS -->`` and ``<!-- end -->``; ``flags:`` writes the names with two dashes, and
``CLASS / group, group`` takes some groups alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spin.alignment.core.errors import lookup  # noqa: E402
from spin.alignment.core.files import write_text_atomic  # noqa: E402
from spin.alignment.core.key_tables import key_table  # noqa: E402
from spin.alignment.core.settings import grouped  # noqa: E402
from spin.alignment.data.config import DataConfig  # noqa: E402
from spin.alignment.data.reformat import ReformatConfig  # noqa: E402
from spin.alignment.evaluation.config import EvaluateConfig  # noqa: E402
from spin.alignment.generation.config import GenerateConfig  # noqa: E402
from spin.alignment.models.config import ModelConfig  # noqa: E402
from spin.alignment.pairs.config import ConvertConfig  # noqa: E402
from spin.alignment.pipeline.config import LaunchConfig, RunConfig, RunData  # noqa: E402
from spin.alignment.token_weights.config import WeightsConfig  # noqa: E402
from spin.alignment.training.keys import OutputConfig, SFTKeys, SPINKeys  # noqa: E402
from spin.alignment.training.online.keys import OnlineKeys  # noqa: E402

CLASSES: dict[str, type] = {
    item.__name__: item
    for item in (
        *(ReformatConfig, GenerateConfig, ConvertConfig, WeightsConfig, EvaluateConfig),
        *(ModelConfig, DataConfig, OutputConfig, SPINKeys, SFTKeys, OnlineKeys),
        *(RunConfig, RunData, LaunchConfig),
    )
}
# Sections of `spin run`: what stands before their keys.
PREFIXES = {"RunData": "data.", "LaunchConfig": "launch."}
TABLE = re.compile(r"<!-- (keys|flags): (\w+)(?: / ([\w, ]+))? -->\n.*?<!-- end -->", re.DOTALL)


def table(match: re.Match[str]) -> str:
    """Return the place of a table with the table as it must be."""
    kind, name, groups = match.groups()
    config_class = lookup(CLASSES, name, "settings class")
    known = grouped(config_class)
    wanted = groups.split(", ") if groups else list(known)
    fields = [field for group in wanted for field in lookup(known, group, f"group of {name}")]
    prefix = "--" if kind == "flags" else PREFIXES.get(name, "")
    opening = match.group(0).partition("\n")[0]
    return f"{opening}\n{key_table(fields, config_class, prefix)}\n<!-- end -->"


def up_to_date(text: str) -> str:
    """Return a page with every table as the settings declare it."""
    return TABLE.sub(table, text)


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = up_to_date(before)
        if after != before:
            write_text_atomic(page, after)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
