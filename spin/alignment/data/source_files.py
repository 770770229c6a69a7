"""Data sets by name: the files of a split of a local one, and the records of any, also of a Hub data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.dataset_folders import Splits, find_splits, numbered_name
from spin.alignment.data.file_readers import SUFFIXES, data_suffix, read_file
from spin.alignment.data.source_names import is_local, name_and_config
from spin.alignment.data.split_names import PREFERENCES, is_held_out, same_splits

_LARGE_FILE_POINTER = b"version https://git-lfs"


def read_records(source: str, split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the raw rows of a file, a folder, or a Hub data set as ``("file row N", record)``.

    Raises:
        InputError: the source is missing, empty, damaged, or of an unknown file type.
    """
    if not is_local(source):
        name, config = name_and_config(source)
        if data_suffix(Path(name)) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"{name} does not exist: check the path")
        from spin.alignment.data.hub import read_hub

        yield from read_hub(name, config, split)
        return
    empty = True
    for file in split_files(source, split):
        for where, record in read_file(file):
            empty = False
            yield where, record
    if empty:
        raise InputError(f"{source} contains no rows: give a file with data in it")


def split_files(source: str | Path, split: str | None) -> list[Path]:
    """Return the data files of one split of a local data set, or the file itself.

    A split is found under its own name, then with or without the ending ``_prefs``; failing that, ``train`` is also a name such
    as ``train_sft`` if only one exists, and finally the only table of any name.

    Raises:
        InputError: no such file, several candidates, or a numbered set (``-00000-of-00003``) with a missing file.
    """
    name, config = name_and_config(source)
    try:
        return _found_files(Path(name), config, split)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or name} ({error.strerror}): check its permissions") from error


def _found_files(path: Path, config: str | None, split: str | None) -> list[Path]:
    if path.is_file():
        if config:
            raise InputError(f"{path} is a file and has no configurations: remove '{config}'")
        _check_type(path)
        files = [path]
    else:
        splits = find_splits(path, config)
        files = (
            _files_of(splits, split, path)
            if split is not None
            else sorted(file for some in splits.values() for file in some)
        )
        if not files:
            raise InputError(f"{path} contains no data file: check the folder")
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_LARGE_FILE_POINTER)) == _LARGE_FILE_POINTER:
                raise InputError(f"{file} is only a pointer to a large file: run 'git lfs pull' in the repository")
    return files


def _check_type(path: Path) -> None:
    if not data_suffix(path):
        raise InputError(f"{path} has an unknown file type: give a file that ends in {', '.join(SUFFIXES)}")


def _files_of(splits: Mapping[str, list[Path]], split: str, path: Path) -> list[Path]:
    plain = split.removesuffix(PREFERENCES)
    chosen: Splits = {name: splits[name] for name in same_splits(split) if name in splits}
    if not chosen:
        chosen = {name: files for name, files in splits.items() if name.startswith(f"{plain}_")}
        if len(chosen) > 1:
            related = ", ".join(sorted(chosen))
            raise InputError(f"{path} contains several splits like '{plain}' ({related}): name one of them")
    if not chosen and len(splits) == 1 and split in same_splits("train"):
        chosen = {name: files for name, files in splits.items() if not is_held_out(name)}
    if not chosen:
        found = ", ".join(file.name if name in file.name else f"{name} ({file.name})" for name, file in _some(splits))
        raise InputError(
            f"{path} contains no file of the split '{plain}' (found {found or 'no data file'}): check the folder or the split "
            "name"
        )
    name, files = next(iter(chosen.items()))
    kinds = sorted({data_suffix(file) for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"{path} contains the split '{name}' as {' and '.join(kinds)} files: remove one kind or name a file"
        )
    _check_numbered(path, files)
    return files


def _some(splits: Mapping[str, list[Path]]) -> list[tuple[str, Path]]:
    return [(name, file) for name, files in splits.items() for file in files][:5]


def _check_numbered(folder: Path, files: list[Path]) -> None:
    """Refuse an incomplete set such as ``train-00000-of-00003``: its writer, or a copy of it, was interrupted."""
    sets: dict[tuple[str, int], set[int]] = {}
    others: list[Path] = []
    for file in files:
        numbered = numbered_name(file.name.removesuffix(data_suffix(file)))
        if numbered and numbered["total"]:
            sets.setdefault((numbered["name"] or "", int(numbered["total"])), set()).add(int(numbered["number"]))
        else:
            others.append(file)
    for (name, total), numbers in sets.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            lacking = f"{name}-{missing[0]:05d}-of-{total:05d}".lstrip("-")
            raise InputError(f"{folder} is missing {lacking}: the set is incomplete; write or copy it again")
    if sets and others:
        raise InputError(
            f"{folder} contains {others[0].name} besides the numbered set {next(iter(sets))[0]}: remove one"
        )
    if len(sets) > len({name for name, _ in sets}):
        raise InputError(f"{folder} mixes numbered sets of different sizes ({', '.join(map(str, sets))}): remove one")
