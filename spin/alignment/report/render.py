"""Renders the templates in ``templates/``: all values are escaped, and a missing value is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return the page of ``templates/{template}.html.jinja`` with the values filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("spin.alignment.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["file"] = page_file
    environment.filters["json_in_script"] = json_in_script
    return environment.get_template(f"{template}.html.jinja").render(values)


def page_file(name: str) -> Markup:
    """Return a style sheet or script in ``templates/`` as it is: the pages contain them instead of loading them."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8").rstrip("\n"))


def json_in_script(value: Any) -> Markup:
    """Return JSON for a ``<script type="application/json">``: without ``<``, no text can end the script or open a comment."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
