"""Checks of the paths that settings name, before anything is read or written."""

from __future__ import annotations

import os
from pathlib import Path

from spin.alignment.core.errors import InputError

# What Linux, macOS and the file systems of clusters share.
MAX_NAME, MAX_PATH = 255, 4096


def checked_path(text: str, where: str) -> str:
    """Return a path with ``~`` expanded to the home folder.

    Raises:
        InputError: a path that no file system has: empty, too long, not UTF-8, or with a control character; ``where`` names the
            setting.
    """
    if not text.strip():
        raise InputError(f"{where} is empty: give a path")
    if "\0" in text or any(ord(letter) < 32 for letter in text):
        raise InputError(f"{where} is {text[:60]!r}, which has a control character in it: correct the path")
    expanded = os.path.expanduser(text)  # noqa: PTH111  (Path would raise for an unknown user)
    if expanded.startswith("~"):
        raise InputError(f"{where} is {text}, and there is no such home folder: write the path out")
    try:
        sizes = [len(os.fsencode(name)) for name in expanded.split("/")]
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is {text[:60]!r}, which is not text in UTF-8: correct the path") from error
    if max(sizes) > MAX_NAME or sum(sizes) + len(sizes) - 1 > MAX_PATH:
        raise InputError(
            f"{where} is '{text[:40]}...', which is too long for a path: use at most {MAX_NAME} bytes a name"
        )
    return expanded


def checked_name(text: str, where: str) -> str:
    """Return the name of a split, which becomes part of the names of files.

    Raises:
        InputError: a name that a file cannot have, or that would lead to another folder.
    """
    if "/" in text or text in (".", ".."):
        raise InputError(f"{where} is {text[:60]!r}: give a name without '/', since files are named after it")
    if len(os.fsencode(text)) > MAX_NAME - 60:  # files add ".", a number and a suffix to it
        raise InputError(f"{where} is '{text[:40]}...', which is too long: give a shorter name")
    return checked_path(text, where)


def check_output_folder(path: str | Path, where: str) -> None:
    """Check that a folder exists or can be created, and that files can be written to it; nothing is written.

    Raises:
        InputError: ``where`` names the setting.
    """
    folder = Path(path)
    _check_dangling(folder, where)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{where} {folder} is a file: choose a folder")
    _check_writable(folder, where)


def check_output_file(path: str | Path, where: str) -> None:
    """Check that a file can be written; nothing is written.

    Raises:
        InputError: ``where`` names the setting.
    """
    file = Path(path)
    _check_dangling(file, where)
    if file.is_dir():
        raise InputError(f"{where} {file} is a folder: give the path of a file in it")
    _check_writable(file.absolute().parent, where)


def _check_dangling(path: Path, where: str) -> None:
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{where} {path} is a link to {path.readlink()}, which does not exist: create it, or remove the link"
        )


def _check_writable(folder: Path, where: str) -> None:
    """Check the closest folder above (or at) ``folder`` that exists."""
    for above in (folder.absolute(), *folder.absolute().parents):
        _check_dangling(above, where)
        try:
            exists = above.exists()
        except PermissionError:
            raise InputError(
                f"{where} {folder} cannot be reached (no permission): choose a folder you may write to"
            ) from None
        if not exists:
            continue
        if not above.is_dir():
            raise InputError(f"{where} {folder} is below {above}, which is a file: choose another folder")
        if not os.access(above, os.W_OK | os.X_OK) or _is_virtual(above):
            raise InputError(
                f"{where} {folder} cannot be written ({above} is read-only for you): choose another folder"
            )
        return


def _is_virtual(folder: Path) -> bool:
    """Whether a folder belongs to the kernel: root may write there by its mode, but no file can be created."""
    return folder.resolve().parts[:2] in (("/", "proc"), ("/", "sys"))
