"""Files that ship with the project but are not modules: ``configs/``, ``scripts/``, and the data of two demos.

An installed package has its own copies in ``spin/assets`` (``setup.py`` puts them there); in a checkout, including an
editable install, they are the folders of the repository. :func:`asset` hides the difference.
"""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError

PACKAGE = Path(__file__).resolve().parents[2]


def is_checkout() -> bool:
    """Return whether this is the repository itself or an editable install of it, not an installed package."""
    return not (PACKAGE / "assets").is_dir()


def asset(name: str) -> Path:
    """Return the path of a shipped file or folder, given its path in the repository, such as ``configs/demo.yaml``.

    Raises:
        InputError: no shipped file has that name.
    """
    root = PACKAGE.parent if is_checkout() else PACKAGE / "assets"
    path = root / name
    if not path.exists():
        raise InputError(f"{name} is not part of this installation ({path} is missing): reinstall selfplay-spin")
    return path
