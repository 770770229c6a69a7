"""Streaming reads and writes of parquet files, one row group at a time, in constant memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from spin.alignment.core.content_hash import sealed_file
from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import atomic_file
from spin.alignment.core.provenance import Provenance

SKIPPED_KEY = b"spin.skipped"
_TAIL = 8  # bytes at the end of a parquet file: the length of the footer (little endian), and "PAR1"
ROW_GROUP_BYTES = 64 * 2**20  # uncompressed, in memory


class _FileWithFooter:
    """A file whose last bytes, the footer, are preceded by their checksum.

    Parquet has checksums of pages only, and allows bytes that no page uses in front of the footer: ``MAGIC`` and the XXH3 (128
    bits) of all that follows. Other readers do not look at them.
    """

    MAGIC = b"footer-xxh3:"
    LENGTH = len(MAGIC) + 16

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held: bytearray | None = None
        self.closed = False  # read by pyarrow

    def write(self, data: Any) -> int:
        if self._held is None:
            return self._file.write(data)
        self._held += data
        return len(data)

    def tell(self) -> int:
        return self._file.tell() + len(self._held or b"")

    def flush(self) -> None:
        self._file.flush()

    def hold_back(self) -> None:
        """Keep what is written from now on: the rest of the pages, and the footer."""
        self._held = bytearray()

    def write_footer(self) -> None:
        """Write what was kept, with the checksum in its place."""
        assert self._held is not None
        start = len(self._held) - _footer_size(self._held[-_TAIL:])
        pages, footer = self._held[:start], self._held[start:]
        self._file.write(pages + self.MAGIC + xxhash.xxh3_128_digest(footer) + footer)

    @classmethod
    def is_damaged(cls, path: Path) -> bool:
        """Return whether a footer is not what was written; False without a checksum (another writer, an earlier version)."""
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            footer = _footer_size(file.read())
            file.seek(max(0, size - footer - cls.LENGTH))
            found = file.read()
        seal, footer_bytes = found[: cls.LENGTH], found[cls.LENGTH :]
        return seal.startswith(cls.MAGIC) and seal[len(cls.MAGIC) :] != xxhash.xxh3_128_digest(footer_bytes)


def _footer_size(tail: bytes | bytearray) -> int:
    """Return the size of a footer, its length and the closing magic number included, from the last bytes of a file."""
    return int.from_bytes(tail[:4], "little") + _TAIL


class ParquetSink:
    """Context manager for a parquet file written one row group at a time that appears only once it is complete."""

    def __init__(
        self,
        path: str | Path,
        schema: pa.Schema,
        provenance: Provenance,
        skipped: Sequence[dict[str, str]] = (),
        metadata: Mapping[bytes, bytes] | None = None,
        sealed: bool = False,
        compression: str = "zstd",
    ) -> None:
        """``skipped`` lists the skipped prompts with reasons; ``metadata`` is additional schema metadata. Every page and
        the footer have a checksum; with ``sealed`` the whole file has one too (:mod:`spin.alignment.core.content_hash`).
        ``compression`` is a codec of parquet, or "none"."""
        self._compression = compression
        self.path, self._open = Path(path), sealed_file if sealed else atomic_file
        record = {SKIPPED_KEY: json.dumps(list(skipped), ensure_ascii=False).encode()} if skipped else {}
        attached = provenance.attach(schema)
        self.schema = attached.with_metadata({**attached.metadata, **record, **(metadata or {})})
        self.num_rows = 0

    def __enter__(self) -> ParquetSink:
        self._file_context = self._open(self.path)
        self._file = _FileWithFooter(self._file_context.__enter__())
        self._writer = pq.ParquetWriter(
            self._file, self.schema, compression=self._compression, write_page_checksum=True
        )
        self._buffer: list[pa.Table] = []
        return self

    def write(self, rows: Sequence[dict[str, Any]] | pa.Table) -> None:
        """Append rows that have the columns of the schema."""
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
            self._writer.is_open = False  # otherwise its destructor writes a footer to the removed file
            return self._file_context.__exit__(kind, error, trace)
        try:
            self._flush()
            self._file.hold_back()
            self._writer.close()
            self._file.write_footer()
        except BaseException as failure:  # the disk may be full: remove the temporary file and explain
            self._writer.is_open = False
            if not self._file_context.__exit__(type(failure), failure, failure.__traceback__):
                raise
        return self._file_context.__exit__(None, None, None)


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open a parquet file; raise :class:`InputError` if it is missing, truncated or not parquet, or repeats a column's name."""
    try:
        if _FileWithFooter.is_damaged(Path(path)):
            raise pa.ArrowInvalid("its footer differs from its checksum")
        # Pre-buffering keeps every chunk it has read, so memory would grow with the file.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
        names = file.schema_arrow.names
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise InputError(
            f"{path} is not a readable parquet file ({reason_of(error)}): restore it or write it again"
        ) from error
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"{path} has several columns named '{repeated[0]}': rename or remove one")
    return file


def read_batches(
    path: str | Path, batch_size: int = 1024, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Stream the record batches of a parquet file, one in memory at a time.

    Raises:
        InputError: the file is missing or corrupt.
    """
    file, count = open_parquet(path), 0
    batches = file.iter_batches(batch_size=batch_size, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            if batch is None and count != file.metadata.num_rows:  # the header of a page has no checksum
                raise pa.ArrowInvalid(f"{count} rows of {file.metadata.num_rows}")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged ({reason_of(error)}): restore it or write it again") from error
        if batch is None:
            return
        count += batch.num_rows
        yield batch


def check_whole(path: str | Path) -> None:
    """Read a parquet file and compare every page with its checksum.

    Raises:
        InputError: the file is missing or damaged.
    """
    for _ in read_batches(path):
        pass


def read_rows(
    path: str | Path, batch_size: int = 1024, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Stream the rows of a parquet file, one record batch in memory at a time.

    Raises:
        InputError: the file is missing or corrupt, or a text in it is not UTF-8.
    """
    for batch in read_batches(path, batch_size, columns):
        yield from batch_rows(batch, path)


def batch_rows(batch: pa.RecordBatch, path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a record batch of a file.

    Raises:
        InputError: a text in it is not UTF-8.
    """
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"{path} contains text that is not UTF-8 ({reason_of(error)}): write it again") from error


def read_skipped(path: str | Path) -> list[dict[str, str]]:
    """Return the prompts that generation skipped for this file, each with ``prompt_id`` and ``reason``."""
    record = (open_parquet(path).schema_arrow.metadata or {}).get(SKIPPED_KEY)
    return json.loads(record) if record else []
