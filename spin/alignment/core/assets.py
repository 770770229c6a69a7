"""The files that ship with the project and are no modules: ``configs/``, ``data/iter0/`` and ``scripts/``.

An installed package has its own copies in ``spin/assets`` (``setup.py`` puts them there); in a checkout, an editable
install included, they are the repository's own folders. Nothing else needs to know which of the two it runs from.
"""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError

PACKAGE = Path(__file__).resolve().parents[2]


def is_checkout() -> bool:
    """Return whether this is the repository itself, an editable install included, and not an installed package."""
    return not (PACKAGE / "assets").is_dir()


def asset(name: str) -> Path:
    """Return the path of a file or folder that ships, by its place in the repository, such as ``configs/demo.yaml``.

    Raises:
        InputError: nothing of that name ships.
    """
    root = PACKAGE.parent if is_checkout() else PACKAGE / "assets"
    path = root / name
    if not path.exists():
        raise InputError(
            f"{name} does not ship with this installation ({path} is missing): install selfplay-spin again"
        )
    return path
