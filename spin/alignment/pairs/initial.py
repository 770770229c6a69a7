"""Responses of the initial model, joined to the pairs of any iteration: the third response that some losses read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import hash_json, read_provenance
from spin.alignment.core.sides import INITIAL
from spin.alignment.data.fractions import fraction_path
from spin.alignment.pairs.gather import Split

if TYPE_CHECKING:
    from spin.alignment.core.provenance import Provenance

# Column of a generated row -> its name in a pair.
_COLUMNS = {
    "rejected": INITIAL,
    "rejected_token_ids": f"{INITIAL}_token_ids",
    "rejected_finish_reason": f"{INITIAL}_finish_reason",
}


class InitialResponses:
    """The initial model's responses to the prompts of one split, in memory (about the uncompressed size of their files)."""

    def __init__(self, folder: Path, split: str) -> None:
        """Read all fractions of a split.

        Raises:
            InputError: a fraction is missing or damaged, or a prompt occurs twice.
        """
        self.folder = folder
        fractions = Split(folder, split)
        fractions.survey()
        batches = []
        while (fraction := fractions.take()) is not None:
            batches += [batch.select(["prompt_id", "sample_index", *_COLUMNS]) for batch in fractions.read(fraction)]
        fractions.conclude()
        table = pa.Table.from_batches(batches)
        keys = zip(table.column("prompt_id").to_pylist(), table.column("sample_index").to_pylist(), strict=True)
        self._rows = {key: number for number, key in enumerate(keys)}
        self._table = table.select(list(_COLUMNS)).rename_columns(list(_COLUMNS.values()))

    def join(self, pairs: pa.RecordBatch) -> pa.RecordBatch:
        """Return pairs with the columns ``initial``, ``initial_token_ids`` and ``initial_finish_reason``: the response of the
        initial model to the same prompt with the same sample index.

        Raises:
            InputError: it has no response to a prompt, or too few; the prompt is named.
        """
        numbers = []
        for key in zip(pairs.column("prompt_id").to_pylist(), pairs.column("sample_index").to_pylist(), strict=True):
            if key not in self._rows:
                raise InputError(
                    f"{self.folder} has no response to prompt {key[0]}, sample {key[1]}, which the pairs need: generate with the "
                    "initial model from the same prompts, with the same num_samples"
                )
            numbers.append(self._rows[key])
        found = self._table.take(pa.array(numbers, pa.int64())).combine_chunks()
        schema = with_initial(pairs.schema)
        columns = [
            column.combine_chunks().cast(schema.field(name).type)
            for name, column in zip(found.column_names, found.columns, strict=True)
        ]
        return pa.RecordBatch.from_arrays([*pairs.columns, *columns], schema=schema)


def with_initial(schema: pa.Schema) -> pa.Schema:
    """Return the schema of pairs extended by the columns of the third response."""
    from spin.alignment.data.rows import OPTIONAL_COLUMNS

    kinds = OPTIONAL_COLUMNS | {INITIAL: schema.field("rejected").type}  # turns may have optional fields
    return pa.schema([*schema, *(pa.field(name, kinds[name]) for name in _COLUMNS.values())])


def initial_record(folder: Path, split: str, made: Provenance) -> dict[str, str]:
    """Return what the provenance of the pairs records of the initial model: hashes of its responses' provenance and its weights.

    Raises:
        InputError: there are no responses for the split, or their tokenizer or chat template differs from that of ``made``, the
            responses of the pairs.
    """
    path = fraction_path(folder, split, 0)
    if not path.is_file():
        raise InputError(
            f"initial is {folder}, which has no {path.name}: generate the split '{split}' with the initial model"
        )
    found = read_provenance(open_parquet(path).schema_arrow, path)
    for name in ("tokenizer_hash", "chat_template_hash"):
        if getattr(found, name) != getattr(made, name):
            raise InputError(
                f"{path} was generated with a different tokenizer or chat template from the pairs ({name} differs): generate it "
                "with the model that the first iteration started from"
            )
    # All fractions share the rest of the record, so the first one stands for the split.
    record = asdict(found) | {"data_frac": 0, "extra": {}}
    return {"initial_hash": hash_json(record), "initial_weights": found.weights_hash}
