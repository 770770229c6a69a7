"""Memory-mapped prompts of a split: random access in constant memory, shared by all processes on a machine."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.console import say_error
from spin.alignment.core.content_hash import is_damaged, remove_sealed, sealed_file
from spin.alignment.core.provenance import hash_texts, id_number
from spin.alignment.data.formats import CARRIED_COLUMNS
from spin.alignment.data.rows import PROMPT_SCHEMA, Features, prompt_texts, stream_prompts, without_null_fields
from spin.alignment.data.turns import OPTIONAL_FIELDS

# The file has every optional field and column, because it is written before the last row has been read.
_SCHEMA = Features({*OPTIONAL_FIELDS}, {*CARRIED_COLUMNS}).extend(PROMPT_SCHEMA)
_ROWS = 1024  # per record batch; all batches but the last are full, so a row is found by division
_OPEN_BATCHES = 1024
ID_MODULUS = 2**64


def ids_sum(prompt_ids: Iterator[str]) -> str:
    """Return the sum of :func:`id_number` over ids modulo 2**64 as 16 hex digits: equal for the same ids in any order."""
    return f"{sum(map(id_number, prompt_ids)) % ID_MODULUS:016x}"


class PromptStore:
    """The prompts of one split in an Arrow file with record batches of equal size.

    Attributes:
        num_rows: number of prompts.
        prompts_hash: hash of all rows in order (:func:`spin.alignment.data.rows.prompts_hash`).
        all_ids: sum of all prompt ids (:func:`ids_sum`).
        features: the optional fields and columns that some row has.
    """

    def __init__(self, path: Path) -> None:
        """Open a file that :meth:`create` wrote."""
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        # The rows of an open batch stay in the file; to open it again takes longer than to read a row.
        self._batch = functools.lru_cache(_OPEN_BATCHES)(reader.get_batch)
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.num_rows: int = facts["num_rows"]
        self.prompts_hash: str = facts["prompts_hash"]
        self.all_ids: str = facts["all_ids"]
        self.features = Features({*facts.get("fields", ())}, {*facts.get("columns", ())})

    @classmethod
    def found(cls, path: Path) -> PromptStore | None:
        """Open ``path`` if it exists and is whole."""
        files = (path, path.with_suffix(".json"))  # the JSON file is written last
        try:
            return cls(path) if all(file.exists() and not is_damaged(file) for file in files) else None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def open(cls, path: Path, input_dir: str, split: str) -> PromptStore:
        """Open ``path``, creating it from the data set if it does not exist or is damaged.

        Processes that do so at once write equal files and rename them atomically; with a lease, only one does the work.

        Raises:
            InputError: a row violates the row contract, or two rows share an id.
        """
        if store := cls.found(path):
            return store
        if path.exists() and path.with_suffix(".json").exists():
            say_error(f"{path} is damaged: written again from the data")
        cls.create(path, input_dir, split)
        return cls(path)

    @staticmethod
    def create(path: Path, input_dir: str, split: str) -> None:
        """Stream the prompts of a data set to ``path`` and their count and hashes to a JSON file next to it."""
        rows = stream_prompts(input_dir, split, ground_truth_required=False)
        count, total, features = 0, 0, Features()

        # Hashing, counting and writing share one pass over the data.
        def texts() -> Iterator[str]:
            nonlocal count, total
            while batch := list(islice(rows, _ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
                for row in batch:
                    count, total = count + 1, total + id_number(row["prompt_id"])
                    features.add(row)
                    yield from prompt_texts(row)

        with sealed_file(path) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            digest = hash_texts(texts())
        facts: dict[str, Any] = {"num_rows": count, "prompts_hash": digest, "all_ids": f"{total % ID_MODULUS:016x}"}
        facts |= {"fields": sorted(features.fields), "columns": sorted(features.columns)}
        with sealed_file(path.with_suffix(".json")) as file:
            file.write(json.dumps(facts).encode())

    def __len__(self) -> int:
        return self.num_rows

    def table(self, indices: Sequence[int]) -> pa.Table:
        """Return rows by index, in this order, with all columns of the file: ``prompt_id``, ``chosen`` (which ends with a user
        turn if there is no ground truth), and the carried columns; fields and columns that a row lacks are null."""
        wanted = np.asarray(indices, dtype=np.int64)
        order = wanted.argsort(kind="stable")
        batches, places = np.divmod(wanted[order], _ROWS)
        starts = np.flatnonzero(np.diff(batches, prepend=-1))
        groups = zip(batches[starts].tolist(), np.split(places, starts[1:]), strict=True)
        pieces = [self._some_rows(batch, some) for batch, some in groups]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.Table.from_batches(pieces, _SCHEMA).combine_chunks().take(pa.array(back))

    def _some_rows(self, number: int, places: np.ndarray) -> pa.RecordBatch:
        batch = self._batch(number)
        # Scattered rows are mostly alone in their batch, and a slice copies nothing.
        return batch.slice(int(places[0]), 1) if len(places) == 1 else batch.take(pa.array(places))

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of :meth:`table` as Python values, without the fields and columns that a row lacks."""
        return [without_null_fields(row) for row in self.table(indices).to_pylist()]

    def remove(self) -> None:
        """Remove the files; processes that have them open can still read them."""
        remove_sealed([self.path.with_suffix(".json"), self.path])
