"""Pages from the templates in ``templates/``: what a model or a user wrote is escaped, a value a template lacks is an error."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """Return the page that ``templates/{template}.html.jinja`` makes of the values."""
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
