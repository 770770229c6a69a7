"""Preference rows of a split: forming pairs, dropping some of them, and writing them to numbered files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import fsync_folder, remove_files, remove_leftovers
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.core.sides import SIDES
from spin.alignment.data.rows import LABEL_TYPE, OPTIONAL_COLUMNS
from spin.alignment.methods.pairings import Pairing, missing_ground_truth
from spin.alignment.pairs.annotate import Labeller, count_failures
from spin.alignment.pairs.counts import COUNTS, counts_path, write_counts
from spin.alignment.pairs.initial import InitialResponses


def pair_schema(pairing: Pairing, schema: pa.Schema) -> pa.Schema:
    """Return the columns of the pairs that a pairing forms from rows with the columns of ``schema``."""
    fields = (
        pa.field(name, OPTIONAL_COLUMNS.get(name, LABEL_TYPE)) for name in pairing.adds if name not in schema.names
    )
    return pa.schema([*schema, *fields])


@dataclass(frozen=True)
class Selection:
    """How pairs are formed, and which are dropped: those with equal responses, those with a response truncated by length.

    A pairing that compares scores needs a ``labeller``. With ``initial`` every pair gets the initial model's response too.
    """

    pairing: Pairing
    drop_identical: bool = False
    drop_truncated: bool = False
    labeller: Labeller | None = None
    initial: InitialResponses | None = None

    def apply(self, batch: pa.RecordBatch, num_samples: int, counts: dict[str, int]) -> pa.RecordBatch:
        """Return the remaining pairs of a batch of whole prompts, and update the counts.

        Raises:
            InputError: a conversation is empty or missing, the scorer cannot score a response, or the pairing returns columns
                that the rows do not have.
        """
        counts["rows"] += batch.num_rows
        if self.pairing.keeps_rows or self.pairing.reads_ground_truth:
            self._check_ground_truth(batch)
        # A pairing that keeps rows as they are stays in Arrow: converting millions of rows to Python takes minutes.
        pairs = batch if self.pairing.keeps_rows else self._paired(batch, num_samples, counts)
        if self.initial is not None:
            pairs = self.initial.join(pairs)
        identical = equal_responses(pairs).to_numpy(zero_copy_only=False)
        truncated = np.zeros(pairs.num_rows, dtype=bool)
        for name in pairs.schema.names:
            if name.endswith("_finish_reason"):
                cut = pc.fill_null(pc.equal(pairs.column(name), "length"), False)
                truncated |= cut.to_numpy(zero_copy_only=False)
        dropped = np.zeros(pairs.num_rows, dtype=bool)
        if self.drop_identical:
            dropped |= identical
        if self.drop_truncated:
            dropped |= truncated
        for name, mask in (("identical", identical), ("truncated", truncated), ("dropped", dropped)):
            counts[name] += int(mask.sum())
        return pairs.filter(pa.array(~dropped)) if dropped.any() else pairs

    def _check_ground_truth(self, batch: pa.RecordBatch) -> None:
        ground_truths = batch.column("chosen")
        if ground_truths.null_count:
            number = int(np.argmax(ground_truths.is_null().to_numpy(zero_copy_only=False)))
            raise missing_ground_truth(batch.column("prompt_id")[number].as_py(), self.pairing.name)

    def _paired(self, batch: pa.RecordBatch, num_samples: int, counts: dict[str, int]) -> pa.RecordBatch:
        rows = batch.to_pylist()
        prompts = [rows[start : start + num_samples] for start in range(0, len(rows), num_samples)]
        if self.labeller is not None:
            self.labeller.label(prompts)
        found = [self.pairing(prompt) for prompt in prompts]
        if self.pairing.needs:
            counts["ties"] += sum(not pairs for pairs in found)
            counts["failed"] += sum(count_failures(prompt, self.pairing.reads_ground_truth) for prompt in prompts)
            if self.pairing.counts_unpaired:
                counts["unpaired"] += sum(map(self.pairing.unpaired, prompts))
        pairs = [pair for some in found for pair in some]
        schema = pair_schema(self.pairing, batch.schema)
        unknown = {name for pair in pairs for name in pair} - set(schema.names)
        if unknown:
            raise InputError(
                f"the pairing returns the columns {', '.join(sorted(unknown))}, which the rows do not have: name chosen_X and "
                "rejected_X as a label X of the pairing"
            )
        return pa.RecordBatch.from_pylist(pairs, schema)


def equal_responses(batch: pa.RecordBatch) -> pa.Array:
    """Return for each pair whether its responses are equal, ignoring leading and trailing whitespace: text, thoughts, tool calls.

    Raises:
        InputError: a conversation has no last turn, or the turn has no text.
    """
    chosen, rejected = (last_turns(batch, name) for name in SIDES)
    equal = pc.equal(*(pc.utf8_trim_whitespace(pc.struct_field(turns, "content")) for turns in (chosen, rejected)))
    for name in ("reasoning_content", "tool_calls"):
        if name in {field.name for field in chosen.type}:
            values = (pc.fill_null(pc.struct_field(turns, name), "") for turns in (chosen, rejected))
            equal = pc.and_(equal, pc.equal(*(pc.utf8_trim_whitespace(value) for value in values)))
    return equal


def last_turns(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return the last turn of each conversation in a column.

    Raises:
        InputError: a conversation has no last turn, or the turn has no text.
    """
    column = batch.column(name)
    ends = column.offsets.to_numpy()  # (rows + 1,): row i has the turns ends[i] to ends[i + 1]
    if column.null_count or (np.diff(ends) < 1).any():
        number = int(np.argmax((np.diff(ends) < 1) | column.is_null().to_numpy(zero_copy_only=False)))
    else:
        turns = column.values.take(pa.array(ends[1:] - 1))
        contents = pc.struct_field(turns, "content")
        if not contents.null_count:
            return turns
        number = int(np.argmax(contents.is_null().to_numpy(zero_copy_only=False)))
    prompt_id = batch.column("prompt_id")[number]
    raise InputError(f"'{name}' of prompt {prompt_id} does not end with a turn that has content: generate it again")


class PreferenceFiles:
    """The numbered output files of one split: written under hidden names, and renamed once all of them are complete."""

    def __init__(
        self,
        folder: Path,
        split: str,
        provenance: Provenance,
        schema: pa.Schema,
        rows_per_file: int,
        count_names: Sequence[str] = COUNTS,
    ) -> None:
        self.folder, self.split, self.provenance = folder, split, provenance
        self.schema, self.rows_per_file = schema, rows_per_file
        self.counts_path = counts_path(folder, split)
        self.counts = dict.fromkeys(count_names, 0)
        self.hidden: list[Path] = []
        self._sink: ParquetSink | None = None

    def discard(self) -> None:
        """Abandon the files being written; remove hidden files, including those of a killed run."""
        if self._sink is not None:
            sink, self._sink = self._sink, None
            # Any exception makes the sink remove its temporary file.
            sink.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        remove_leftovers(self.counts_path)
        name = f".{glob.escape(self.split)}_prefs-*.part"
        remove_files([*self.folder.glob(name), *self.folder.glob(f".{name}.*.tmp")])
        self.hidden = []

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows; a full file is closed under its hidden name and a new one is started."""
        table = pa.Table.from_batches([rows])
        self.counts["written"] += table.num_rows
        while table.num_rows:
            if self._sink is None:
                path = self.folder / f".{self.split}_prefs-{len(self.hidden):05d}.part"
                self._sink = ParquetSink(path, self.schema, self.provenance).__enter__()
            free = self.rows_per_file - self._sink.num_rows
            self._sink.write(table.slice(0, free))
            table = table.slice(free)
            if self._sink.num_rows == self.rows_per_file:
                self.finish()

    def finish(self) -> None:
        """Close the file being written."""
        if self._sink is not None:
            sink, self._sink = self._sink, None
            sink.__exit__(None, None, None)
            self.hidden.append(sink.path)

    def withdraw(self) -> None:
        """Remove the files of an earlier conversion, the counts file (its proof of completion) first."""
        remove_files([self.counts_path, *self._named()])

    def publish(self) -> None:
        """Rename the hidden files. A crash in between leaves an incomplete set, which readers refuse and a rerun replaces."""
        # Only now is the number of files known, which is part of each name.
        for number, path in enumerate(self.hidden):
            path.rename(self.folder / f"{self.split}_prefs-{number:05d}-of-{len(self.hidden):05d}.parquet")
        fsync_folder(self.folder)
        write_counts(self.counts_path, self.counts)

    def is_complete(self) -> bool:
        """Return whether all files exist, with the counts file as proof of completion."""
        files = self._named()
        return self.counts_path.exists() and bool(files) and len(files) == int(files[0].stem[-5:])

    def _named(self) -> list[Path]:
        return list(self.folder.glob(f"{glob.escape(self.split)}_prefs-*.parquet"))
