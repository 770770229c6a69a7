"""The names of data sets: a file, a folder or a Hub name, which may end with a configuration.

``openai/gsm8k:main`` is the configuration ``main`` of a Hub data set, ``clones/gsm8k:main`` that of a folder.
"""

from __future__ import annotations

from pathlib import Path


def with_config(source: str, config: str | None) -> str:
    """Return the name of a data set with a configuration, which it may already have; an empty name stays empty."""
    return source if not source or not config or source.endswith(f":{config}") else f"{source}:{config}"


def name_and_config(source: str | Path) -> tuple[str, str | None]:
    """Return the name of a data set without its configuration, and the configuration, or ``None``."""
    source = str(source)
    name, colon, config = source.rpartition(":")
    if not colon or not name or not config or "/" in config or _exists(source):
        return source, None
    return name, config


def is_local(source: str | Path) -> bool:
    """Return whether a data set is a file or folder; otherwise its name is that of a Hub data set."""
    return _exists(name_and_config(source)[0])


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False
