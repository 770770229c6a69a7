"""Reading the records of one data file: parquet, Arrow, JSON, JSON lines, CSV and TSV; the text formats also compressed."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import read_rows

Record = dict[str, Any]
MAX_DEPTH = 100  # levels of lists and objects in a record; deeper ones overflow the stack of whatever touches them
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_BLANK = re.compile(r"[ \t\r\n]*")
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# What pandas writes for a missing value where it writes one at all; text tables have no null of their own.
_CSV_NULLS = frozenset({"nan", "NaN", "<NA>"})
_CSV_FIELD = 2**31 - 1  # characters; the csv module's own limit, 131,072, is less than a long conversation


def data_suffix(path: Path) -> str:
    """Return the suffix of a data file, with that of its compression (``.jsonl.gz``); empty if it is not a data file."""
    name, compression = path.name, ""
    if path.suffix.lower() in _COMPRESSIONS:
        name, compression = path.stem, path.suffix
    suffix = Path(name).suffix
    known = _READERS if not compression else _TEXT_SUFFIXES
    return suffix + compression if suffix.lower() in known else ""


def read_file(path: Path) -> Iterator[tuple[str, Record]]:
    """Stream the records of a data file as ``("file row N", record)``.

    Raises:
        InputError: the file is damaged, cut off, of another kind than its name says, or a record is not an object.
    """
    suffix = data_suffix(path).lower()
    if not suffix:
        *known, last = (*SUFFIXES, f"one of these with {', '.join(_COMPRESSIONS)}")
        raise InputError(f"{path} has an unknown file type: give a file that ends in {', '.join(known)}, or {last}")
    for where, record in _READERS["." + suffix.split(".")[1]](path):
        if not isinstance(record, dict):
            raise InputError(f"{where} is {type(record).__name__}, not an object of columns: write one object a row")
        yield where, record


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for row, record in enumerate(read_rows(path)):
        yield f"{path} row {row}", record


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Stream an Arrow file in the stream format, which ``datasets`` writes, or in the file format (Feather)."""
    row = 0
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for record in batch.to_pylist():
                    yield f"{path} row {row}", record
                    row += 1
            if not is_file:
                _check_stream_end(path, source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable Arrow file ({reason}): restore it or write it again") from error


def _check_stream_end(path: Path, source: pa.MemoryMappedFile) -> None:
    """Refuse a stream that was cut off between two of its batches: only its end marker is missing then."""
    size = source.size()
    source.seek(max(0, size - len(_STREAM_END)))
    if size and source.read(len(_STREAM_END)) != _STREAM_END:
        raise InputError(
            f"{path} lacks the marker that ends an Arrow stream, so rows may be missing: write or copy it again"
        )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with _text(path) as lines:
        for row, line in enumerate(lines):
            line = line.lstrip("\ufeff")  # joined files may each start with a byte order mark
            if not line.strip():
                continue
            where = f"{path} line {row + 1}"
            try:
                record = _decoded(line, where)
            except InputError:
                raise
            except ValueError as error:
                _refuse_wrapped(path, row, line)
                # Only an interrupted writer, or a copy of its file, leaves a last line without an end.
                cut_off = "" if line.endswith("\n") else "; the file may be cut off here"
                raise InputError(f"{where} is not JSON ({error}{cut_off}): correct or remove the line") from error
            yield f"{path} row {row}", record


def _refuse_wrapped(path: Path, row: int, line: str) -> None:
    if row == 0 and line.strip() == "{":
        raise InputError(
            f"{path} is a single JSON object over several lines, not rows: write an array of rows, or one object per line"
        )


def _decoded(text: str, where: str) -> Any:
    """Return what a JSON text contains.

    Raises:
        InputError: it is nested too deeply, or an object repeats a key.
        ValueError: it is not JSON.
    """
    try:
        record = _DECODER.decode(text)
    except RecursionError as error:
        raise _too_deep(where) from error
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(record):
        raise _too_deep(where)
    return record


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"has the key '{repeated}' twice in one object: remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _is_deep(record: Any) -> bool:
    level = [record]
    for _ in range(MAX_DEPTH):
        inner = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        )
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True


def _too_deep(where: str) -> InputError:
    return InputError(f"{where} is nested more than {MAX_DEPTH} levels deep: remove the column, or the row")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with _text(path) as file:
        first = file.read(1024).lstrip()[:1]  # many files named .json contain JSON lines
    yield from _read_json_array(path) if first == "[" else _read_jsonl(path)


def _read_json_array(path: Path, chunk: int = 2**20) -> Iterator[tuple[str, Any]]:
    """Stream the objects of a JSON array, with about ``chunk`` characters, or the longest object, in memory."""
    decode, row = json.JSONDecoder(object_pairs_hook=_object).raw_decode, 0
    with _text(path) as file:
        text = file.read(chunk)
        at = text.index("[") + 1
        while True:
            at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
            try:
                if text[at : at + 1] == "]":
                    break
                record, end = decode(text, at)
                end = _BLANK.match(text, end).end()  # type: ignore[union-attr]
                if end == len(text):  # a number at the end of the chunk may continue in the next
                    raise ValueError("the array is not closed")
            except RecursionError as error:
                raise _too_deep(f"{path} row {row}") from error
            except InputError as error:
                raise InputError(f"{path} row {row} {error}") from error
            except ValueError as error:
                # Perhaps only cut off by the end of the chunk: read more, doubling, before giving up.
                text, at = text[at:] + (more := file.read(max(chunk, len(text)))), 0
                if not more:
                    raise InputError(f"{path} is not JSON at row {row} ({error}): correct the file") from error
                continue
            if text[end] not in ",]":
                raise InputError(f"{path} has neither a comma nor a closing bracket after row {row}: correct the file")
            if text.count("[", at, end) + text.count("{", at, end) > MAX_DEPTH and _is_deep(record):
                raise _too_deep(f"{path} row {row}")
            yield f"{path} row {row}", record
            row, at = row + 1, end + (text[end] == ",")
        _refuse_more(path, row, text[at + 1 :], file)


def _refuse_more(path: Path, rows: int, text: str, file: TextIO) -> None:
    """Refuse what follows the end of an array: further rows would be lost."""
    while text or (text := file.read(2**20)):
        if text.strip():
            raise InputError(
                f"{path} goes on after an array of {rows} rows ({text.strip()[:20]!r}): write one array, or one "
                "object per line"
            )
        text = ""


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Stream the rows of a table in text form; its first line names the columns, and every value is text, or null where pandas
    wrote a missing value."""
    csv.field_size_limit(_CSV_FIELD)
    with _text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names) or "" in names:
                raise InputError(f"{path} names its columns {', '.join(names)}: give each a name of its own")
            for row, values in enumerate(values for values in rows if values):
                if len(values) != len(names):
                    raise InputError(
                        f"{path} row {row} has {len(values)} values for {len(names)} columns: put values that contain "
                        "separators or line breaks in quotes"
                    )
                cells = (None if value in _CSV_NULLS else value for value in values)
                yield f"{path} row {row}", dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise InputError(
                f"{path} is not a table of text ({error}, line {rows.line_num}): correct the file"
            ) from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[tuple[str, Any]]:
    return _read_table(path, "\t")


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 text file, compressed or not, with or without a byte order mark."""
    try:
        with _binary(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}){_looks_like(path)}: convert it"
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        if path.suffix.lower() in _COMPRESSIONS and not getattr(error, "errno", None):
            raise InputError(
                f"{path} is damaged or not compressed as its name says ({error}): restore it or write it again"
            ) from error
        raise InputError(f"cannot read {path} ({getattr(error, 'strerror', error)}): check its permissions") from error


def _binary(path: Path) -> IO[bytes]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    path.open("rb").close()  # a missing or unreadable file is an ordinary OSError, whatever reads it
    return lzma.open(path) if compression == "xz" else pa.input_stream(str(path), compression=compression)


def _looks_like(path: Path) -> str:
    signs = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"PAR1": "parquet"}
    with path.open("rb") as file:
        start = file.read(8)
    kinds = [kind for sign, kind in signs.items() if start.startswith(sign)]
    return f" but looks like {kinds[0]}" if kinds else ""


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(_READERS)
_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
