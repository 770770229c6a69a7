"""Reference log-probs on disk, keyed by hashes of weights and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from spin.alignment.core.console import say_error
from spin.alignment.core.content_hash import is_damaged, remove_sealed
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_json, hash_texts
from spin.alignment.core.sides import SIDES

if TYPE_CHECKING:
    from datasets import Dataset

_KEY = b"spin.reference"
_HASHED_ROWS = 1000  # that are in memory at a time


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that the reference log-probs depend on; a store with a different key is rejected."""

    weights: str
    tokens: str
    precision: str

    def name(self) -> str:
        return hash_json(asdict(self))


def hash_tokens(rows: Dataset) -> str:
    """Return a hash of all prompt and response ids, in order."""
    columns = ("prompt_ids", *(f"{name}_ids" for name in responses_of(rows.column_names)))
    batches = rows.select_columns(list(columns)).with_format("arrow").iter(_HASHED_ROWS)
    return hash_texts(
        ids.tobytes().hex()
        for batch in batches
        for row in zip(*(_arrays(batch[name]) for name in columns), strict=True)
        for ids in row
    )


def _arrays(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Yield the values of each row of a column of ids, int32."""
    for chunk in column.chunks:
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        yield from np.split(chunk.flatten().to_numpy().astype(np.int32), ends[:-1])


def responses_of(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the responses that have ids among the columns of encoded pairs: chosen, rejected, then any further ones."""
    found = [name.removesuffix("_ids") for name in columns if name.endswith("_ids") and name != "prompt_ids"]
    return (*SIDES, *sorted(set(found) - set(SIDES)))


def read_table(path: Path) -> pa.Table | None:
    """Return the content of a store or of a part of one, memory-mapped; None if it is damaged."""
    try:
        return None if is_damaged(path) else pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError):
        return None


def key_of(table: pa.Table) -> dict[str, str]:
    """Return the key that a store records; empty if it has none."""
    found = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    return found if isinstance(found, dict) else {}


def discard_damaged(path: Path) -> bool:
    """Remove a damaged store, so that it is computed again, and say so; return whether there is a whole one."""
    if is_whole(path):
        return True
    if path.exists():
        say_error(f"{path} is damaged: computed again")
        remove_sealed([path])
    return False


def is_whole(path: Path) -> bool:
    """Return whether a store exists and is what was written."""
    return path.exists() and read_table(path) is not None


class ReferenceLogps:
    """A memory-mapped store on disk; ``store[i]`` returns the token log-probs (nats) of each response of pair i, by name."""

    def __init__(self, path: Path, key: ReferenceKey, rows: Dataset) -> None:
        """Open a store and check that it was computed for these weights, tokens and precision.

        Raises:
            InputError: the store is damaged, was computed for other inputs, or has the wrong number of rows.
        """
        table = read_table(path)
        if table is None:
            raise InputError(f"{path} is damaged: remove it to compute it again")
        # The file name contains a hash of the key, but files can be renamed or copied.
        found = key_of(table)
        differing = [name for name, value in asdict(key).items() if found.get(name) != value]
        if differing or table.num_rows != len(rows):
            what = ", ".join(differing) or "the number of rows"
            raise InputError(
                f"{path} belongs to another reference or data set ({what} differs): remove it to compute it again"
            )
        responses = [name for name in table.column_names if name != "index"]
        self._columns = {name: table.column(name) for name in responses}  # not joined: that would copy them

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: column[index].values.to_numpy(zero_copy_only=False) for name, column in self._columns.items()}


def store_path(folder: str | Path, split: str, key: ReferenceKey) -> Path:
    """Return the path of a split's store."""
    return Path(folder) / f"{split}-{key.name()}.arrow"
