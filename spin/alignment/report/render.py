"""Renders the templates in ``templates/``: all values are escaped, and a missing value is an error."""

from __future__ import annotations

from typing import Any


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
    return environment.get_template(f"{template}.html.jinja").render(values)
