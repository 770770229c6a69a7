"""Finding the files of a data set and reading their records: parquet, JSON, JSON lines, or a Hub data set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import read_rows

SUFFIXES = (".parquet", ".jsonl", ".json")
_NUMBERED = re.compile(r"(?P<name>.+?)-(?P<number>\d+)(?:-of-(?P<total>\d+))?(?:-[0-9a-f]{16})?")
_OTHER_SPLITS = ("test", "test_prefs", "validation", "valid", "dev", "eval")
_BLANK = re.compile(r"[ \t\r\n]*")


def read_records(source: str, split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the raw rows of a file, a folder, or a Hub data set as ``("file row N", record)``.

    Raises:
        InputError: the source is missing, empty, damaged, or of an unknown file type.
    """
    path = Path(source)
    if not path.exists():
        if path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"{source} does not exist: check the path")
        yield from _read_hub(source, split)
        return
    empty = True
    for file in split_files(path, split):
        for where, record in _READERS[file.suffix](file):
            empty = False
            yield where, _object_checked(record, where)
    if empty:
        raise InputError(f"{source} contains no rows: give a file with data in it")


def split_files(path: Path, split: str | None) -> list[Path]:
    """Return the data files of one split in a folder (or in its ``data`` folder), or the file itself.

    A file belongs to ``train`` if it is named ``train`` or ``train_prefs``, optionally followed by ``-`` and a number; failing
    that, names such as ``train_sft`` are accepted if only one exists, and finally a single file of any name.

    Raises:
        InputError: no such file, several candidates, or a numbered set (``-00000-of-00003``) with a missing file.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path} has an unknown file type: give a file that ends in {', '.join(SUFFIXES)}")
        return [path]
    files = _data_files(path) or _data_files(path / "data")
    chosen = files
    if split is not None:
        names = {file: match["name"] if (match := _NUMBERED.fullmatch(file.stem)) else file.stem for file in files}
        chosen = [file for file in files if names[file] in (split, f"{split}_prefs")]
        related = sorted({name for name in names.values() if name.startswith(f"{split}_")})
        if not chosen and len(related) > 1:
            raise InputError(f"{path} contains several splits like '{split}' ({', '.join(related)}): name one of them")
        chosen = chosen or [file for file in files if names[file] in related]
        if not chosen and len(files) == 1 and split == "train" and names[files[0]] not in _OTHER_SPLITS:
            chosen = files
    if not chosen:
        found = ", ".join(file.name for file in files[:5]) or "no data file"
        wanted = f"no file of the split '{split}' (found {found})" if split else "no data file"
        raise InputError(f"{path} contains {wanted}: check the folder or the split name")
    kinds = sorted({file.suffix for file in chosen})
    if split and len(kinds) > 1:
        raise InputError(
            f"{path} contains the split '{split}' as {' and '.join(kinds)} files: remove one kind or name a file"
        )
    _check_numbered(path, chosen)
    return chosen


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    records = (".counts.json", ".weights.json")  # statistics that this project writes next to data files
    return sorted(file for file in files if not file.name.startswith(".") and not file.name.endswith(records))


def _check_numbered(folder: Path, files: list[Path]) -> None:
    """Refuse an incomplete set such as ``train-00000-of-00003``: its writer, or a copy of it, was interrupted."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if (numbered := _NUMBERED.fullmatch(file.stem)) and numbered["total"]:
            sets.setdefault((numbered["name"], int(numbered["total"])), set()).add(int(numbered["number"]))
    for (name, total), numbers in sets.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            raise InputError(
                f"{folder} is missing {name}-{missing[0]:05d}-of-{total:05d}: the set is incomplete; write or copy it again"
            )
    if len(sets) > len({name for name, _ in sets}):
        raise InputError(f"{folder} mixes numbered sets of different sizes ({', '.join(map(str, sets))}): remove one")


def _object_checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where} is {type(record).__name__}, not an object of columns: write one object a row")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row, record in enumerate(read_rows(path)):
        yield f"{path} row {row}", record


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _text(path) as lines:
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} line {row + 1} is not JSON ({error}): correct or remove the line") from error
            yield f"{path} row {row}", record


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _text(path) as file:
        first = file.read(1024).lstrip()[:1]  # many files named .json contain JSON lines
    yield from _read_json_array(path) if first == "[" else _read_jsonl(path)


def _read_json_array(path: Path, chunk: int = 2**20) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the objects of a JSON array, with about ``chunk`` characters, or the longest object, in memory."""
    decode, row = json.JSONDecoder().raw_decode, 0
    with _text(path) as file:
        text = file.read(chunk)
        at = text.index("[") + 1
        while True:
            at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
            try:
                if text[at : at + 1] == "]":
                    return
                record, end = decode(text, at)
                end = _BLANK.match(text, end).end()  # type: ignore[union-attr]
                if end == len(text):  # a number at the end of the chunk may continue in the next
                    raise ValueError("the array is not closed")
            except ValueError as error:
                # Perhaps only cut off by the end of the chunk: read more, doubling, before giving up.
                text, at = text[at:] + (more := file.read(max(chunk, len(text)))), 0
                if not more:
                    raise InputError(f"{path} is not JSON at row {row} ({error}): correct the file") from error
                continue
            if text[end] not in ",]":
                raise InputError(f"{path} has neither a comma nor a closing bracket after row {row}: correct the file")
            yield f"{path} row {row}", record
            row, at = row + 1, end + (text[end] == ",")


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check its permissions") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _read_hub(name: str, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"'{name}' is neither a local file or folder nor a reachable Hub data set ({reason}): check the name"
        ) from error
    for row, record in enumerate(rows):
        yield f"{name} row {row}", dict(record)
