"""The file of one fraction: its metadata, and its rows in batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import SKIPPED_KEY
from spin.alignment.core.provenance import read_provenance
from spin.alignment.data.fractions import fraction_size
from spin.alignment.data.rows import GENERATED_SCHEMA, MESSAGES, is_turns_type

# Rows vary from a few bytes to a few hundred kilobytes, so a batch is limited by both.
_BATCH_BYTES = 4 * 2**20
_BATCH_ROWS = 2048


class Fraction:
    """The file of one fraction, opened once: its metadata and its rows.

    Attributes:
        expected: number of prompts it must contain, including those that generation ``skipped``.
        fraction_ids, all_ids: the recorded sums of id numbers, or None.
    """

    def __init__(self, file: pq.ParquetFile, path: Path, number: int) -> None:
        """Read the metadata.

        Raises:
            InputError: there is no provenance, the rows are of another kind, or a column is missing or of the wrong type.
        """
        self.path, self.number, self._file = path, number, file
        schema = file.schema_arrow
        self.provenance = read_provenance(schema, path)
        self.schema: pa.Schema = schema.remove_metadata()
        record = (schema.metadata or {}).get(SKIPPED_KEY)
        self.skipped: list[dict[str, str]] = json.loads(record) if record else []
        self.num_rows: int = file.metadata.num_rows
        self.num_samples = int(self.provenance.sampling.get("num_samples", 1))
        self._check_kind()
        self.fraction_ids, self.all_ids = (self._recorded(name) for name in ID_SUMS)

    def _check_kind(self) -> None:
        kind = self.provenance.kind
        if kind != "generated":
            raise InputError(f"{self.path} contains {kind} rows, not generated ones: give generate.py's output folder")
        missing = set(GENERATED_SCHEMA.names) - set(self.schema.names)
        if missing:
            raise InputError(f"{self.path} is missing the columns {', '.join(sorted(missing))}: generate it again")
        for field in GENERATED_SCHEMA:
            found = self.schema.field(field.name).type
            if found != field.type and not (field.type == MESSAGES and is_turns_type(found)):
                raise InputError(
                    f"{self.path}: the column '{field.name}' is {found}, not {field.type}: generate it again"
                )

    def _recorded(self, name: str) -> int | None:
        value = self.provenance.extra.get(name)
        if value is None:
            return None
        if not re.fullmatch("[0-9a-f]{16}", str(value)):
            raise InputError(f"{self.path} records {name} {value!r}, not 16 hexadecimal digits: generate it again")
        return int(value, 16)

    @property
    def expected(self) -> int:
        return fraction_size(self.provenance.num_prompts, self.number, self.provenance.frac_len)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Stream the rows in batches of whole prompts (``num_samples`` rows each); the last batch may end in a partial one.

        Raises:
            InputError: the file is damaged.
        """
        rest: pa.RecordBatch | None = None
        for batch in self._raw_batches():
            # A record batch may end with a row group, between the samples of a prompt.
            if rest is not None:
                batch = pa.Table.from_batches([rest, batch]).combine_chunks().to_batches()[0]
            whole = batch.num_rows // self.num_samples * self.num_samples
            rest = batch.slice(whole) if whole < batch.num_rows else None
            if whole:
                yield batch.slice(0, whole)
        if rest is not None:
            yield rest

    def _raw_batches(self) -> Iterator[pa.RecordBatch]:
        bytes_of = sum(
            self._file.metadata.row_group(group).total_byte_size for group in range(self._file.num_row_groups)
        )
        rows = min(_BATCH_ROWS, _BATCH_BYTES * self.num_rows // max(1, bytes_of))
        size = max(1, rows // self.num_samples) * self.num_samples
        batches = self._file.iter_batches(batch_size=size)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{self.path} is damaged ({reason}): generate it again") from error
            if batch is None:
                return
            yield batch


def prompt_ids(batch: pa.RecordBatch, num_samples: int) -> list[str] | None:
    """Return the ids of the prompts in a batch; None unless each has the samples 0 to ``num_samples`` - 1 in adjacent rows."""
    ids, samples = batch.column("prompt_id"), batch.column("sample_index")
    if batch.num_rows % num_samples or ids.null_count or samples.null_count:
        return None
    if num_samples > 1:
        # Equal to its predecessor wherever the predecessor is of the same prompt.
        same = pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
        inside = np.arange(1, len(ids)) % num_samples != 0
        if not same[inside].all():
            return None
    if (np.sort(samples.to_numpy().reshape(-1, num_samples), axis=1) != np.arange(num_samples)).any():
        return None
    # The first row of each prompt gives its id.
    heads: list[str] = ids.take(pa.array(np.arange(0, len(ids), num_samples))).to_pylist()
    return heads


ID_SUMS = ("fraction_ids", "all_ids")
