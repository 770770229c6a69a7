"""Cards: the ``README.md`` of a model or data set, whose front matter the Hugging Face Hub reads.

A card says nothing that differs between two runs with the same inputs and seeds (no dates, durations or full paths), so that such
runs write the same bytes. Cards are never part of a content hash: completing one changes no model and no data set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spin.alignment.core.console import say_error
from spin.alignment.core.files import write_text_atomic

if TYPE_CHECKING:
    from huggingface_hub import CardData

CARD_FILE = "README.md"
# Both mark the cards of this project (one of them may be damaged): anyone else's is never replaced.
SIGNATURE = "<!-- written by selfplay-spin -->"
TAG = "selfplay-spin"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def render_card(package: str, template: str, data: CardData, **values: Any) -> str:
    """Return a card: front matter from ``data``, then ``templates/{template}`` of ``package`` filled with ``values``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    body = environment.get_template(template).render(values)
    return f"---\n{data.to_yaml()}\n---\n\n{SIGNATURE}\n\n{body}"


def cell(value: Any) -> str:
    """Return a value as the text of a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split()) or "–"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table without a line break at its end."""
    lines = [headings, ["---"] * len(headings), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_card(folder: Path) -> str | None:
    """Return the text of a folder's card; None if it has none."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def front_matter(text: str | None) -> dict[str, Any]:
    """Return the metadata of a card; empty if there is none, or if it is not YAML."""
    match = _FRONT_MATTER.match(text or "")
    try:
        found = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def is_own(card: str) -> bool:
    """Return whether this project has written a card."""
    tags = front_matter(card).get("tags")
    return SIGNATURE in card or (isinstance(tags, list) and TAG in tags)


def write_card(folder: Path, text: str) -> None:
    """Write a folder's card unless it is there already; one that this project has not written is kept, which is said."""
    found = read_card(folder)
    if found == text:
        return
    if found is not None and not is_own(found):
        say_error(f"{folder / CARD_FILE} is kept: it is not a card that this project wrote; remove it to get one")
        return
    write_text_atomic(folder / CARD_FILE, text)


def section(name: str, text: str) -> str:
    """Return a part of a card that :func:`with_section` can replace later."""
    return f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->"


def with_section(card: str, name: str, text: str) -> str | None:
    """Return a card with another text in one of its sections; None if it has no such section."""
    pattern = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end of {re.escape(name)} -->", re.DOTALL)
    return pattern.sub(lambda _: section(name, text), card, count=1) if pattern.search(card) else None


def called(model: str) -> str:
    """Return how a card calls a model: by its Hub name, or by the name of its folder without the folders above."""
    path = Path(model)
    if not (path.is_dir() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        return model
    # `spin run` calls every model's folder "checkpoint", inside one that tells which model it is.
    parts = path.parts if path.is_absolute() else path.absolute().parts
    return "/".join(parts[-2:]) if parts[-1] == "checkpoint" else parts[-1]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the last parts of each path, as many as it takes to tell them apart: cards do not name the folders above."""
    parts = {path: Path(path).parts for path in paths}
    longest = max((len(item) for item in parts.values()), default=0)
    for count in range(1, longest + 1):
        names = {path: "/".join(item[-count:]).removeprefix("//") for path, item in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def portable(value: Any, names: Mapping[str, str]) -> Any:
    """Return a setting with every path as its last part, or as ``names`` calls it; texts that are no paths stay as they are."""
    if isinstance(value, Mapping):
        return {portable(key, names): portable(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, names) for item in value]
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    is_path = value.startswith(("/", "./", "../", "~")) or ("/" in value and Path(value).exists())
    return Path(value).name if is_path else value
