"""Preference rows of a split: the pairs of a batch, which of them are dropped, and the numbered files they are written to."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.errors import InputError
from spin.alignment.pairing import Pairing
from spin.alignment.provenance import Provenance
from spin.alignment.shards import (
    ParquetSink,
    fsync_folder,
    remove_files,
    remove_leftovers,
    write_json_atomic,
)


@dataclass(frozen=True)
class Selection:
    """How pairs are formed, and which are left out: those of equal responses, those whose response was cut by length."""

    pairing: Pairing
    drop_identical: bool = False
    drop_truncated: bool = False

    def apply(self, batch: pa.RecordBatch, num_samples: int, counts: dict[str, int]) -> pa.RecordBatch:
        """Return the pairs of a batch of whole prompts, those dropped left out, all of them counted.

        Raises:
            InputError: a conversation is empty or missing.
            ValueError: the pairing returns columns that the rows do not have.
        """
        counts["rows"] += batch.num_rows
        pairs = batch if getattr(self.pairing, "keeps_rows", False) else self._paired(batch, num_samples)
        identical = pc.equal(
            *(pc.utf8_trim_whitespace(last_contents(pairs, name)) for name in ("chosen", "rejected"))
        ).to_numpy(zero_copy_only=False)
        finish = pairs.column("rejected_finish_reason")
        truncated = pc.fill_null(pc.equal(finish, "length"), False).to_numpy(zero_copy_only=False)
        dropped = np.zeros(pairs.num_rows, dtype=bool)
        if self.drop_identical:
            dropped |= identical
        if self.drop_truncated:
            dropped |= truncated
        for name, mask in (("identical", identical), ("truncated", truncated), ("dropped", dropped)):
            counts[name] += int(mask.sum())
        return pairs.filter(pa.array(~dropped)) if dropped.any() else pairs

    def _paired(self, batch: pa.RecordBatch, num_samples: int) -> pa.RecordBatch:
        rows = batch.to_pylist()
        pairs = [
            pair
            for start in range(0, len(rows), num_samples)
            for pair in self.pairing(rows[start : start + num_samples])
        ]
        unknown = {name for pair in pairs for name in pair} - set(batch.schema.names)
        if unknown:
            raise ValueError(
                f"the pairing returns the columns {', '.join(sorted(unknown))}, which the rows do not have"
            )
        return pa.RecordBatch.from_pylist(pairs, batch.schema)


def last_contents(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return the text of the last turn of each conversation in a column.

    Raises:
        InputError: a conversation has no last turn, or that has no text.
    """
    column = batch.column(name)
    ends = column.offsets.to_numpy()
    if column.null_count or (np.diff(ends) < 1).any():
        number = int(np.argmax((np.diff(ends) < 1) | column.is_null().to_numpy(zero_copy_only=False)))
    else:
        contents = pc.struct_field(column.values, "content").take(pa.array(ends[1:] - 1))
        if not contents.null_count:
            return contents
        number = int(np.argmax(contents.is_null().to_numpy(zero_copy_only=False)))
    prompt_id = batch.column("prompt_id")[number]
    raise InputError(f"'{name}' of prompt {prompt_id} does not end with a turn that has content: generate it again")


class PreferenceFiles:
    """The numbered output files of one split: written under hidden names, and named when all of them are there."""

    def __init__(self, folder: Path, split: str, provenance: Provenance, schema: pa.Schema, rows_per_file: int) -> None:
        self.folder, self.split, self.provenance = folder, split, provenance
        self.schema, self.rows_per_file = schema, rows_per_file
        self.counts_path = folder / f"{split}_prefs.counts.json"
        self.counts = dict.fromkeys(("rows", "identical", "truncated", "dropped", "skipped", "written"), 0)
        self.hidden: list[Path] = []
        self._sink: ParquetSink | None = None

    def discard(self) -> None:
        """Give up the files being written; remove hidden files, also those of a killed run."""
        if self._sink is not None:
            sink, self._sink = self._sink, None
            sink.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        remove_leftovers(self.counts_path)
        name = f".{glob.escape(self.split)}_prefs-*.part"
        remove_files([*self.folder.glob(name), *self.folder.glob(f".{name}.*.tmp")])
        self.hidden = []

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows; a full file is closed under its hidden name and another begun."""
        table = pa.Table.from_batches([rows])
        self.counts["written"] += table.num_rows
        while table.num_rows:
            if self._sink is None:
                path = self.folder / f".{self.split}_prefs-{len(self.hidden):05d}.part"
                self._sink = ParquetSink(path, self.schema, self.provenance).__enter__()
            room = self.rows_per_file - self._sink.num_rows
            self._sink.write(table.slice(0, room))
            table = table.slice(room)
            if self._sink.num_rows == self.rows_per_file:
                self.finish()

    def finish(self) -> None:
        """Close the file being written."""
        if self._sink is not None:
            sink, self._sink = self._sink, None
            sink.__exit__(None, None, None)
            self.hidden.append(sink.path)

    def withdraw(self) -> None:
        """Remove the set of an earlier conversion, its proof of completion first."""
        remove_files([self.counts_path, *self._named()])

    def publish(self) -> None:
        """Give the hidden files their names. A crash in between leaves a set that readers refuse and a rerun replaces."""
        for number, path in enumerate(self.hidden):
            path.rename(self.folder / f"{self.split}_prefs-{number:05d}-of-{len(self.hidden):05d}.parquet")
        fsync_folder(self.folder)
        write_json_atomic(self.counts_path, self.counts)

    def is_whole(self) -> bool:
        """Return whether the set is there with its proof of completion."""
        files = self._named()
        return self.counts_path.exists() and bool(files) and len(files) == int(files[0].stem[-5:])

    def _named(self) -> list[Path]:
        return list(self.folder.glob(f"{glob.escape(self.split)}_prefs-*.parquet"))


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder and keep other gatherings out of it; the kernel drops the lock of a dead holder.

    Raises:
        InputError: another gathering writes there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): choose a folder you may write to") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another convert_data.py writes to {folder}: let it end or choose another output_dir"
            ) from error
        except OSError:
            pass  # a file system that locks no folders (NFS): then it is up to the user, as everywhere
        yield
    finally:
        os.close(descriptor)
