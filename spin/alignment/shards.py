"""Files of rows: atomic writes, fractions of a data set, and the crash-safe parts of one fraction."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spin.alignment.errors import InputError
from spin.alignment.provenance import Provenance, hash_json, read_provenance

# The shuffle before fractions is part of the file contract: every server must cut the same deck the same way.
SHUFFLE_SEED = 42
SKIPPED_KEY = b"spin.skipped"
ROW_GROUP_BYTES = 64 * 2**20


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; at a clean exit fsync and rename it, otherwise remove it.

    Raises:
        InputError: the folder cannot be written, or the disk is full. ``path`` is then as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise (_explained(error, path) or error) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files that killed writers of ``paths`` left; only for a file's one writer to call."""
    for path in paths:
        remove_files(path.parent.glob(f".{path.name}.*.tmp"))


def _explained(error: OSError, path: Path) -> InputError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"no space left on the disk while writing {path}: free some and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return InputError(f"cannot write {path} ({error.strerror}): choose a folder you may write to")
    return None


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file: the whole new content appears, or the old one stays."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write an indented JSON file atomically; keys keep their order."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise :class:`InputError` when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON ({error}): restore or remove the file") from error


class ParquetSink:
    """A parquet file written row group by row group that appears only when it is complete (a context manager)."""

    def __init__(
        self, path: str | Path, schema: pa.Schema, provenance: Provenance, skipped: Sequence[dict[str, str]] = ()
    ) -> None:
        self.path = Path(path)
        self.schema = provenance.attach(schema)
        if skipped:
            record = json.dumps(list(skipped), ensure_ascii=False).encode()
            self.schema = self.schema.with_metadata({**self.schema.metadata, SKIPPED_KEY: record})
        self.num_rows = 0

    def __enter__(self) -> ParquetSink:
        self._file_context = atomic_file(self.path)
        self._writer = pq.ParquetWriter(self._file_context.__enter__(), self.schema, compression="zstd")
        self._buffer: list[pa.Table] = []
        return self

    def write(self, rows: Sequence[dict[str, Any]] | pa.Table) -> None:
        """Append rows (in the schema's columns)."""
        table = rows.cast(self.schema) if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), self.schema)
        self.num_rows += table.num_rows
        self._buffer.append(table)
        if sum(item.nbytes for item in self._buffer) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            self._writer.write_table(pa.concat_tables(self._buffer))
            self._buffer = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self._writer.is_open = False  # else its destructor writes a footer into the removed file
            return self._file_context.__exit__(kind, error, trace)
        try:
            self._flush()
            self._writer.close()
        except BaseException as failure:
            self._writer.is_open = False
            if not self._file_context.__exit__(type(failure), failure, failure.__traceback__):
                raise
        return self._file_context.__exit__(None, None, None)


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open a parquet file; raise :class:`InputError` when it is missing, torn or not parquet."""
    try:
        # Pre-buffering keeps every chunk ever read: memory would grow with the file.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path") from error
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable parquet file ({reason}): restore it or write it again") from error


def read_batches(
    path: str | Path, batch_size: int = 1024, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Stream a parquet file, a record batch in memory at a time.

    Raises:
        InputError: the file is missing or damaged.
    """
    batches = open_parquet(path).iter_batches(batch_size=batch_size, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged ({reason}): restore it or write it again") from error
        if batch is None:
            return
        yield batch


def read_rows(
    path: str | Path, batch_size: int = 1024, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Stream the rows of a parquet file, a record batch in memory at a time."""
    for batch in read_batches(path, batch_size, columns):
        yield from batch.to_pylist()


def read_skipped(path: str | Path) -> list[dict[str, str]]:
    """Return the prompts that generation left out of this file, each with ``prompt_id`` and ``reason``."""
    record = (open_parquet(path).schema_arrow.metadata or {}).get(SKIPPED_KEY)
    return json.loads(record) if record else []


def fraction_rows(num_rows: int, data_frac: int, frac_len: int) -> list[int]:
    """Return the row indices of a fraction: shuffle all rows with seed 42, then cut slices of ``frac_len`` rows.

    ``frac_len`` 0 is one fraction that holds everything. Fractions are disjoint and together cover the data.

    Raises:
        InputError: a negative number, or a fraction behind the end of the data.
    """
    total = num_fractions(num_rows, frac_len)
    if not 0 <= data_frac < total:
        raise InputError(
            f"data_frac is {data_frac}, but {num_rows} rows in pieces of frac_len {frac_len} make the fractions 0 to {total - 1}"
        )
    order = list(range(num_rows))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return order[frac_len * data_frac :][: frac_len or None]


def num_fractions(num_rows: int, frac_len: int) -> int:
    """Return how many fractions of ``frac_len`` rows the data makes (1 when ``frac_len`` is 0)."""
    if frac_len < 0:
        raise InputError(f"frac_len is {frac_len}: set it to 0 (everything) or to the rows of one fraction")
    return max(1, -(-num_rows // frac_len)) if frac_len else 1


def fraction_path(output_dir: str | Path, split: str, data_frac: int) -> Path:
    """Return the file of one fraction."""
    return Path(output_dir) / f"{split}-{data_frac:05d}.parquet"


class FractionParts:
    """The parts of one fraction while it is generated: each is complete or absent, in a hidden folder beside the result.

    The folder is named after the provenance and the size of a part, so parts of another run are never taken for these.
    """

    def __init__(self, path: Path, schema: pa.Schema, provenance: Provenance, part_len: int, num_rows: int) -> None:
        self.path, self.schema, self.provenance, self.part_len = path, schema, provenance, part_len
        self.num_parts = -(-num_rows // part_len)
        name = hash_json({**asdict(provenance), "part_len": part_len})
        self.folder = path.parent / ".parts" / f"{path.stem}-{name}"

    def part_path(self, index: int) -> Path:
        return self.folder / f"part-{index:06d}.parquet"

    def rows_of(self, index: int) -> slice:
        """Return which of the fraction's prompts a part holds."""
        return slice(index * self.part_len, (index + 1) * self.part_len)

    def pending(self) -> list[int]:
        """Return the parts still to be made; none when the fraction's file is there already."""
        with self._locked():
            return [] if self.is_merged() else self._missing()

    def _missing(self) -> list[int]:
        return [index for index in range(self.num_parts) if not self.part_path(index).exists()]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the fraction's lock, which dies with its holder: parts never vanish under a process that counts them."""
        path = self.folder.parent / f"{self.path.stem}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise (_explained(error, path) or error) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write(self, index: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write one part atomically."""
        with ParquetSink(self.part_path(index), self.schema, self.provenance) as sink:
            sink.write(rows)

    def merge(self, skipped: Sequence[dict[str, str]] = ()) -> bool:
        """Stream all parts in order into the fraction's file, then remove them; return False when some are not there yet.

        Any number of processes may call this: a lock, which dies with its holder, lets one of them do it.
        """
        with self._locked():
            if self.is_merged():
                return True
            if self._missing():
                return False
            with ParquetSink(self.path, self.schema, self.provenance, skipped) as sink:
                for index in range(self.num_parts):
                    for batch in read_batches(self.part_path(index)):
                        sink.write(pa.Table.from_batches([batch]))
            for folder in self.folder.parent.glob(f"{self.path.stem}-*"):
                shutil.rmtree(folder)
            return True

    def is_merged(self) -> bool:
        """Return whether the fraction's file is there and made from the same things."""
        if not self.path.exists():
            return False
        return not self.provenance.differences(
            read_provenance(open_parquet(self.path).schema_arrow, self.path), ignore=("extra",)
        )


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that may be gone already."""
    for path in list(paths):
        path.unlink(missing_ok=True)
