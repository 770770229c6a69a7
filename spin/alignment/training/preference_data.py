"""Preference pairs for training: encoded once on each machine, or in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.core.errors import InputError
from spin.alignment.core.forked_map import forked_map
from spin.alignment.core.provenance import hash_text, hash_texts
from spin.alignment.data.mixture import pieces_of
from spin.alignment.data.pair_files import PairBatch, PairMixture, pair_mixtures
from spin.alignment.data.preferences import conversion_record
from spin.alignment.data.split_names import preference_split
from spin.alignment.data.stored_ids import check_origin
from spin.alignment.logprobs.reference_store import hash_tokens, responses_of
from spin.alignment.training.accounting import Account
from spin.alignment.training.encode_rows import ORIGIN, ROWS, EncodedBatch, PairEncoding, progress, workers_for
from spin.alignment.training.encoded_store import (
    EncodedSplit,
    Spool,
    encoded_splits,
    is_shared,
    read_split,
    write_split,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.training.config import SPINConfig
    from spin.alignment.training.settings import Settings

TOKENS = "tokens"  # the hash of all ids of a split
_HASHED_ROWS = 1000  # hashed at a time


def encode_rows(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, Account]:
    """Encode preference rows in memory (see :class:`PairEncoding`); return the encoded rows and the account of all rows and
    tokens read. ``reverse`` swaps chosen and rejected, including their token weights and labels.

    Raises:
        InputError: a row is invalid, columns are missing, or no pair remains.
    """
    from datasets import Dataset

    encoding = PairEncoding.of(rows.column_names, rows.unique("source"), encoder, config, loss_type, reverse)
    read = rows.select_columns([name for name in rows.column_names if name in encoding.read]).with_format(None)

    def encode(places: range) -> Any:
        columns = read[places.start : places.stop]
        found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        named = [f"{row['source']} row {place}" for row, place in zip(found, places, strict=True)]
        return encoding.encode(found, named)

    parts = (range(len(rows))[start : start + ROWS] for start in range(0, len(rows), ROWS))
    batches, account = [], Account()
    for batch in forked_map(encode, parts, workers_for(len(rows), config, others_wait=False)):
        batches.append(batch.rows)
        account.extend(batch.account)
    found = Dataset(pa.Table.from_batches(batches, encoding.schema))
    check_account(account, found)
    return found, account


def check_account(account: Account, encoded: Dataset) -> None:
    """Check that the encoded rows are those that were counted, and that there are any.

    Raises:
        InputError: no pair remains.
        RuntimeError: rows or tokens were lost (an internal error).
    """
    if not len(encoded):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in account.dropped.items())
        raise InputError(f"no pair remains to train on ({reasons}): check the data, or raise max_length")
    table = encoded.with_format("arrow")[:]
    ids = [table[name] for name in table.column_names if name.endswith("_ids")]
    account.check(len(encoded), sum(pc.sum(pc.list_value_length(column)).as_py() for column in ids))


def load_pairs(settings: Settings, encoder: ChatEncoder) -> dict[str, EncodedSplit]:
    """Return the encoded splits of the data, from the store of this machine, which is made if there is none.

    Raises:
        InputError: the data cannot be used.
    """
    check_preference(settings)
    data, seed = settings.data, settings.arguments.seed
    for path in data.dataset_mixer if not data.retokenize else ():
        for split in data.dataset_splits:
            check_origin(path, split, encoder, ", or set retokenize: true to encode their text for this model")

    def make(folder: Path) -> dict[str, tuple[Account, dict[str, str]]]:
        mixtures = pair_mixtures(data.dataset_mixer, data.dataset_splits, seed)
        return {use: encode_mixture(mixture, encoder, settings, folder, use) for use, mixture in mixtures.items()}

    pieces = pieces_of(data.dataset_mixer, data.dataset_splits, preference_split)
    return encoded_splits(pieces, encoder, data, pairs_key(settings), make)


def pairs_key(settings: Settings) -> dict[str, Any]:
    """Return all settings that decide the encoded pairs, except for those that :func:`encoded_splits` adds."""
    loss = settings.arguments.loss
    return {
        "kind": "pairs",
        "seed": settings.arguments.seed,
        "retokenize": settings.data.retokenize,
        "loss": settings.arguments.loss_type,
        "reads": [loss.responses, loss.compares, [astuple(label) for label in loss.labels]],
        "reverse": settings.arguments.reverse,
    }


def encode_mixture(
    mixture: PairMixture, encoder: ChatEncoder, settings: Settings, folder: Path, use: str
) -> tuple[Account, dict[str, str]]:
    """Write the encoded rows of a split to a store, in memory that grows with their number by about 30 bytes per row.

    Raises:
        InputError: a row is invalid, columns are missing, or no pair remains.
    """
    sources = [piece.source for piece in mixture.pieces]
    arguments = settings.arguments
    encoding = PairEncoding.of(
        mixture.schema.names, sources, encoder, settings.data, arguments.loss_type, arguments.reverse
    )
    mixture.check_repeated()
    count = sum(mixture.counts)
    is_used, kept, account = np.zeros(count, bool), np.zeros(count, bool), Account()
    is_used[mixture.order] = True

    def encode(batch: PairBatch) -> tuple[np.ndarray, EncodedBatch]:
        used = np.flatnonzero(is_used[batch.first : batch.first + batch.rows.num_rows])
        table = mixture.read(batch)
        read = table.select([name for name in table.column_names if name in encoding.read])
        rows = read.take(pa.array(used)).to_pylist()
        return batch.first + used, encoding.encode(rows, [mixture.name_of(batch, row) for row in used.tolist()])

    def encoded() -> Iterator[pa.RecordBatch]:
        for used, found in forked_map(encode, mixture.batches(), workers):
            kept[used] = found.kept
            account.extend(found.account)
            tell(account.rows)
            yield found.rows

    tell = progress(f"encoding pairs, {use} split", len(mixture.order))
    workers = workers_for(len(mixture.order), settings.data, is_shared(settings.data))
    spool = Spool(folder / f"{use}.spool", encoding.schema)
    spool.write(encoded())
    stored = np.cumsum(kept) - 1  # number of a row of the mixture among those encoded
    write_split(folder, use, encoding.schema, spool.in_order(stored[mixture.order[kept[mixture.order]]]))
    spool.path.unlink()
    rows = read_split(folder, use)
    check_account(account, rows)
    return account, column_hashes(rows)


def check_preference(settings: Settings) -> None:
    """Check that the pairing of every data set states a preference if the loss compares two responses.

    Raises:
        InputError: a pairing states none; it is named with its data set.
    """
    loss_type = settings.arguments.loss_type
    for path in settings.data.dataset_mixer if settings.arguments.loss.compares else ():
        for split in settings.data.dataset_splits:
            record = conversion_record(path, split)
            if record.get("prefers") is False:
                raise InputError(
                    f"the pairs in {path} have no preference (pairing {record['pairing']}), but loss_type {loss_type} compares "
                    "two responses: choose a loss that treats each separately, or convert the data with another pairing"
                )


def column_hashes(rows: Dataset) -> dict[str, str]:
    """Return the hash of all ids, as :data:`TOKENS`, and that of each column of token weights or labels, by its name."""
    others = sorted(name for name in rows.column_names if not name.endswith("_ids") and name not in ORIGIN)
    batches = rows.with_format("arrow")
    return {TOKENS: hash_tokens(rows)} | {
        name: hash_texts(str(value) for batch in batches.iter(_HASHED_ROWS) for value in batch[name].to_pylist())
        for name in others
    }


def joined_key(hashes: Mapping[str, Mapping[str, str]]) -> str:
    """Return one hash of the encoded pairs of all splits (ids, and any token weights and labels) from :func:`column_hashes`."""
    parts = []
    for split, found in sorted(hashes.items()):
        parts.append(f"{split}={found[TOKENS]}")
        parts += [f"{split}.{name}={value}" for name, value in found.items() if name != TOKENS]
    return hash_text(*parts)


def largest(pairs: dict[str, Dataset]) -> tuple[int, int]:
    """Return the length (tokens) of the longest prompt plus response, and the largest token id."""
    length = token = 0
    for rows in pairs.values():
        table = rows.with_format("arrow")[:]  # Arrow computes lengths without a Python list per row
        prompts = pc.list_value_length(table["prompt_ids"])
        for name in responses_of(rows.column_names):
            length = max(length, pc.max(pc.add(prompts, pc.list_value_length(table[f"{name}_ids"]))).as_py())
        token = max(
            token, *(pc.max(pc.list_flatten(table[name])).as_py() for name in table.column_names if "_ids" in name)
        )
    return length, token


def check_budget(pairs: dict[str, Dataset], arguments: SPINConfig) -> None:
    """Check that every pair fits into a micro-batch.

    Raises:
        InputError: the longest pair does not; it is named.
    """
    budget = arguments.max_tokens_per_batch
    for split, rows in pairs.items():
        if budget is None:
            continue
        table = rows.with_format("arrow")[:]
        names = responses_of(rows.column_names)
        prompt, *responses = (pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", *names))
        prompts = 1 if arguments.share_prompts else len(names)  # copies of the prompt in a packed row
        tokens = functools.reduce(pc.add, responses, pc.multiply(prompt, prompts))
        longest = pc.max(tokens).as_py()
        if longest > budget:
            raise InputError(
                f"max_tokens_per_batch is {budget}, but pair {pc.index(tokens, longest).as_py()} of {split} has {longest} "
                f"tokens (prompt, {', '.join(names[:-1])} and {names[-1]}): raise it to {longest}, or lower max_length"
            )
