"""The parts of a fraction during generation, and merging them into one file."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.content_hash import is_damaged, seal_path
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import remove_files
from spin.alignment.core.parquet import ParquetSink, check_whole, open_parquet, read_batches
from spin.alignment.core.provenance import Provenance, hash_json, read_provenance
from spin.alignment.data.fractions import PARTS_FOLDER, fraction_path, num_fractions
from spin.alignment.data.template_date import DATE_FILE

POSITIONS_KEY = b"spin.positions"
_MERGE_PROMPTS = 256
_CACHED_BYTES = 128 * 2**20


def clear_parts(output_dir: Path, split: str, num_rows: int, frac_len: int) -> bool:
    """Remove the working files of a split once all of its fractions exist, and return whether they do.

    What another split needs is kept.
    """
    parts = output_dir / PARTS_FOLDER
    numbers = range(num_fractions(num_rows, frac_len))
    if not all(fraction_path(output_dir, split, number).exists() for number in numbers):
        return False
    # A worker killed between merging and cleaning up leaves parts of complete fractions.
    for left in [*parts.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9]*"), *parts.glob(f"*prompts-{split}-*")]:
        remove_folder(left) if left.is_dir() else left.unlink(missing_ok=True)
    if not any(path for path in parts.glob("*-*") if path.name != DATE_FILE):
        remove_files([*(parts / "workers").glob("*"), parts / DATE_FILE])
        for folder in (parts / "workers", parts):
            # If it is not empty, another worker is still running and will remove it.
            with contextlib.suppress(OSError):
                folder.rmdir()
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder while other processes may still add a file to it or remove it too."""

    def raise_unless_racing(_: Any, path: str, failure: Any) -> None:
        if failure[1].errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise failure[1]

    # Renamed first, so that its files vanish all at once: a lease removed before its folder could be taken again by a worker
    # that has not seen the merge, which would then generate the block a second time.
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.removed")
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another process removes it
        return
    while aside.exists():
        shutil.rmtree(aside, onerror=raise_unless_racing)


@dataclass(frozen=True)
class _Part:
    """One file of finished rows, and the positions of its prompts in the fraction, in the order of its rows."""

    path: Path
    positions: list[int]


class FractionJournal:
    """The finished rows of one fraction during generation, in parts written by any number of workers.

    A prompt is identified by its *position* among the prompts of the fraction. A part contains all samples of the prompts that
    had finished when it was written; it is complete or absent. The parts are in a hidden folder next to the result, whose name
    contains a hash of the provenance, so parts of another run are never mistaken for these.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, provenance: Provenance, num_prompts: int, num_samples: int = 1
    ) -> None:
        self.path, self.schema, self.provenance = path, schema, provenance
        self.num_samples = num_samples
        self.folder = path.parent / PARTS_FOLDER / f"{path.stem}-{hash_json(asdict(provenance))}"
        self.finished = np.zeros(num_prompts, dtype=bool)
        self.torn: list[Path] = []
        self._parts: dict[str, _Part] = {}
        self._written = 0
        # What this worker has written need not be read again to be merged, as far as there is memory for it.
        self._tables = _TableCache(_CACHED_BYTES)

    def open(self) -> None:
        """Create the folder, and see which parts exist already.

        Raises:
            InputError: the output folder, which existed at the start, has disappeared.
        """
        try:
            # Without parents=True: see accepts_parts().
            self.folder.parent.mkdir(exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise self._vanished(self.path.parent) from None
        self.scan()

    def scan(self) -> None:
        """Register parts that any worker has written since the last scan.

        A part that cannot be read is renamed and listed in ``torn``; its prompts will be generated again.
        """
        for name in self._new_parts():
            path = self.folder / name
            try:
                positions = self._positions(path)
            except (InputError, OSError, KeyError, TypeError, ValueError):
                if path.exists():
                    path.rename(path.with_suffix(".torn"))
                    remove_files([seal_path(path)])
                    self.torn.append(path)
                continue
            self._note(path, positions)

    def _new_parts(self) -> list[str]:
        """Return the names of parts that are not registered, sorted. Looked for before every block that is claimed, among the
        leases of all blocks."""
        with contextlib.suppress(FileNotFoundError):  # the fraction has been merged, or the disk is lost
            names = {path.name for path in self.folder.iterdir()}.difference(self._parts)
            return sorted(name for name in names if name.startswith("part-") and name.endswith(".parquet"))
        return []

    def _positions(self, path: Path) -> list[int]:
        """Return the positions in a part whose content has been checked; raise an error if it is damaged."""
        if is_damaged(path):
            raise InputError(f"{path} is damaged")
        if not seal_path(path).exists():  # of an earlier version
            check_whole(path)
        positions = json.loads((open_parquet(path).schema_arrow.metadata or {})[POSITIONS_KEY])
        if not all(0 <= position < len(self.finished) for position in positions):
            raise ValueError(f"{path} contains prompts that the fraction does not have")
        return positions

    def _note(self, path: Path, positions: list[int]) -> None:
        self._parts[path.name] = _Part(path, positions)
        self.finished[positions] = True

    def write(self, worker: str, positions: list[int], rows: pa.Table) -> None:
        """Write the rows of the prompts at some positions, in this order, as one part.

        Raises:
            InputError: the disk is full, or the folder is read-only or has disappeared.
        """
        if not self.accepts_parts():
            return
        path = self.folder / f"part-{worker}-{self._written:06d}.parquet"
        record = {POSITIONS_KEY: json.dumps(positions).encode()}
        # Compressed when they are merged: doing it twice takes longer than everything else about a part.
        with ParquetSink(path, self.schema, self.provenance, metadata=record, sealed=True, compression="none") as sink:
            sink.write(rows)
        self._written += 1
        self._tables.add(path, rows)
        self._note(path, positions)

    def accepts_parts(self) -> bool:
        """Return whether the folder of the parts exists; False if another worker has merged the fraction in the meantime.

        Raises:
            InputError: the folder has disappeared for another reason. It is not created again: under a lost mount point that
                would write to a different disk, where the rows would be lost.
        """
        if self.folder.is_dir():
            return True
        if self.is_merged():
            return False
        raise self._vanished(self.folder)

    @staticmethod
    def _vanished(folder: Path) -> InputError:
        return InputError(
            f"{folder} disappeared during generation: check that its disk is still mounted, then run the same command again"
        )

    def is_complete(self) -> bool:
        """Return whether every prompt is in a part that this process has seen."""
        return bool(self.finished.all())

    def is_merged(self) -> bool:
        """Return whether the fraction's file exists and has the same provenance."""
        if not self.path.exists():
            return False
        # ``extra`` contains hashes of inputs and ids that the other fields cover already; files of older versions lack them.
        found = read_provenance(open_parquet(self.path).schema_arrow, self.path)
        return not self.provenance.differences(found, ignore=("extra",))

    def merge(self, skipped: Sequence[dict[str, str]] = ()) -> None:
        """Stream the rows of all parts, ordered by position, to the fraction's file, then remove the parts.

        The file depends only on the rows, not on which worker wrote them or in which order. A prompt in two parts (its worker
        was presumed dead) is taken from the first.
        """
        with ParquetSink(self.path, self.schema, self.provenance, skipped) as sink:
            for table in self._in_order():
                sink.write(table)
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the parts of this fraction, including those of other runs."""
        for folder in self.folder.parent.glob(f"{self.path.stem}-*"):
            remove_folder(folder)

    def _in_order(self) -> Iterator[pa.Table]:
        """Yield the rows by position, a few hundred prompts at a time."""
        # position -> the first part that contains the prompt, and its rank there; each prompt is taken once
        place: dict[int, tuple[str, int]] = {}
        for name in sorted(self._parts):
            for rank, position in enumerate(self._parts[name].positions):
                place.setdefault(position, (name, rank))
        for start in range(0, len(self.finished), _MERGE_PROMPTS):
            positions = range(start, min(start + _MERGE_PROMPTS, len(self.finished)))
            wanted: dict[str, list[int]] = {}
            for position in positions:
                name, rank = place[position]
                wanted.setdefault(name, []).append(rank)
            pieces, order = [], []
            for name, ranks in wanted.items():
                rows = [rank * self.num_samples + sample for rank in ranks for sample in range(self.num_samples)]
                pieces.append(self._tables.read(self._parts[name].path).take(pa.array(rows, pa.int64())))
                order += [self._parts[name].positions[rank] for rank in ranks]
            # Stable, so the samples of a prompt keep their order.
            rows_of = np.repeat(np.array(order), self.num_samples).argsort(kind="stable")
            yield pa.concat_tables(pieces).take(pa.array(rows_of)).replace_schema_metadata(None)


def finished_prompts(folder: Path) -> int:
    """Return the number of prompts in the parts of a journal's folder, ignoring parts that are being written or removed."""
    positions: set[int] = set()
    for path in folder.glob("part-*.parquet"):
        with contextlib.suppress(InputError, KeyError, ValueError):
            positions.update(json.loads((open_parquet(path).schema_arrow.metadata or {})[POSITIONS_KEY]))
    return len(positions)


class _TableCache:
    """The most recently used tables, up to a number of bytes; neighbouring positions are in few parts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tables: OrderedDict[Path, pa.Table] = OrderedDict()
        self._bytes = 0

    def add(self, path: Path, table: pa.Table) -> None:
        """Keep the rows that a file contains."""
        self._tables[path] = table
        self._bytes += table.nbytes
        while len(self._tables) > 1 and self._bytes > self.limit:
            self._bytes -= self._tables.popitem(last=False)[1].nbytes

    def read(self, path: Path) -> pa.Table:
        """Return the rows of a file, from memory if they are there."""
        if path in self._tables:
            self._tables.move_to_end(path)
        else:
            self.add(path, pa.Table.from_batches(list(read_batches(path))).combine_chunks())
        return self._tables[path]
