"""Encodes prompts with their ground truth for SFT, once on each machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.core.errors import InputError
from spin.alignment.core.forked_map import forked_map, in_lists
from spin.alignment.core.provenance import hash_pieces
from spin.alignment.data.chat_encoder import template_arguments
from spin.alignment.data.encode_pairs import EncodedPair, pair_steps
from spin.alignment.data.encode_together import run_together
from spin.alignment.data.mixture import Piece, pieces_of
from spin.alignment.data.rows import load_prompts, stream_prompts
from spin.alignment.training.accounting import Account
from spin.alignment.training.encode_rows import ROWS, count_encoded, progress, workers_for
from spin.alignment.training.encoded_store import EncodedSplit, encoded_splits, is_shared, read_split, write_split
from spin.alignment.training.sft_rows import with_labels

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.settings import Settings

CONTENT = "ids and labels"  # the hash of all splits
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("prompt_id", pa.string()), ("source", pa.string()), ("prompt_ids", _IDS), ("response_ids", _IDS)])


def load_ground_truth(settings: Settings, encoder: ChatEncoder) -> dict[str, EncodedSplit]:
    """Return the encoded splits of the data, from the store of this machine, which is made if there is none.

    Their rows have ``prompt_ids`` and ``response_ids`` with their origin.

    Raises:
        InputError: a data set or split is missing or named twice, a fraction is out of range, a row cannot be encoded, or no
            row of a data set remains.
    """
    data, seed = settings.data, settings.arguments.seed
    pieces = pieces_of(data.dataset_mixer, data.dataset_splits)

    def make(folder: Path) -> dict[str, tuple[Account, dict[str, str]]]:
        accounts = {piece.use: Account() for piece in pieces}
        for use, account in accounts.items():
            own = (encoded_piece(piece, encoder, settings, account) for piece in pieces if piece.use == use)
            write_split(folder, use, _SCHEMA, chain.from_iterable(own))
        content = hash_rows({use: read_split(folder, use) for use in accounts})
        return {use: (account, {CONTENT: content}) for use, account in accounts.items()}

    return encoded_splits(pieces, encoder, data, {"kind": "sft", "seed": seed}, make)


def encoded_piece(piece: Piece, encoder: ChatEncoder, settings: Settings, total: Account) -> Iterator[pa.RecordBatch]:
    """Yield the encoded rows of a data set in batches, and add the account of all rows and tokens read to ``total``.

    Raises:
        InputError: a row cannot be encoded, or no row remains.
    """
    data, account = settings.data, Account()

    def encode(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[pa.RecordBatch, Account]:
        # As in preference training, where the other response may shorten it further.
        pairs = [{name: row[name] for name in ("prompt_id", "chosen")} | template_arguments(row) for _, row in rows]
        lengths = data.max_length, data.max_prompt_length
        steps = [pair_steps(pair, encoder, *lengths, ("chosen",)) for pair in pairs]
        encoded, own = [], Account()
        for (index, row), result in zip(rows, run_together(steps, encoder.encode_all), strict=True):
            if isinstance(result, InputError):
                raise InputError(f"{piece.source} row {index} (prompt {row['prompt_id']}): {result}") from result
            count_encoded(result, own)
            if isinstance(result, EncodedPair):
                ids = {"prompt_ids": result.prompt_ids, "response_ids": result.chosen_ids}
                encoded.append({"prompt_id": row["prompt_id"], "source": piece.source} | ids)
        return pa.RecordBatch.from_pylist(encoded, _SCHEMA), own

    rows, tokens = enumerate(selected_prompts(piece, settings.arguments.seed)), 0
    first = list(islice(rows, ROWS * 3))
    tell = progress(f"encoding {piece.source}")
    workers = workers_for(len(first), data, is_shared(data))
    for batch, own in forked_map(encode, in_lists(chain(first, rows), ROWS), workers):
        account.extend(own)
        tokens += sum(len(batch.column(name).flatten()) for name in ("prompt_ids", "response_ids"))
        tell(account.rows)
        yield batch
    if not account.kept:
        reasons = dict(account.dropped)
        raise InputError(f"{piece.source}: no row remains to train on ({reasons}): check the data, or raise max_length")
    account.check(account.kept, tokens)
    total.extend(account)


def selected_prompts(piece: Piece, seed: int) -> Iterator[Mapping[str, Any]]:
    """Stream the prompts of a data set that are used, of which several may be the same one with other answers. A fraction of them
    takes memory for all."""
    if piece.fraction == 1:
        return stream_prompts(piece.source, piece.split, may_repeat=True)
    return iter(piece.selected(load_prompts(piece.source, piece.split, may_repeat=True), seed))


def hash_rows(splits: Mapping[str, Dataset]) -> str:
    """Return one hash of the ids and labels of all splits: ``hash_json`` of ``{split: [input_ids, labels]}``, of every row."""

    def pieces() -> Iterator[str]:
        for number, (split, rows) in enumerate(sorted(splits.items())):
            yield f"{', ' if number else '{'}{json.dumps(split)}: ["
            for name in ("input_ids", "labels"):
                yield "[" if name == "input_ids" else ", ["
                for place, row in enumerate(_ids_of(rows)):
                    yield f"{', ' if place else ''}{with_labels(row)[name]}"
                yield "]"
            yield "]"
        yield "}"

    return hash_pieces(pieces)


def _ids_of(rows: Dataset) -> Iterator[dict[str, list[int]]]:
    names = ["prompt_ids", "response_ids"]
    for batch in rows.select_columns(names).with_format("arrow").iter(ROWS):
        for ids in zip(*(batch[name].to_pylist() for name in names), strict=True):
            yield dict(zip(names, ids, strict=True))


def check_row_lengths(rows: Dataset, split: str, budget: int | None) -> tuple[int, int]:
    """Return the length (tokens) of the longest encoded row, and the largest token id. ``budget`` is that of a micro-batch.

    Raises:
        InputError: the longest row does not fit into a micro-batch.
    """
    table = rows.with_format("arrow")[:]
    columns = [table["prompt_ids"], table["response_ids"]]
    lengths = pc.add(*map(pc.list_value_length, columns))
    longest = pc.max(lengths).as_py()
    if budget is not None and longest > budget:
        raise InputError(
            f"max_tokens_per_batch is {budget}, but row {pc.index(lengths, longest).as_py()} of {split} has {longest} tokens: "
            f"raise it to {longest}, or lower max_length"
        )
    return longest, max(pc.max(pc.list_flatten(column)).as_py() for column in columns)


def check_experts(model_folder: Path, coefficient: float | None) -> None:
    """Check that the model's own loss has no term that SFT does not compute; ``coefficient`` is ``router_aux_loss_coef``.

    Raises:
        InputError: it adds a load-balancing loss of its experts, and the settings do not turn that off.
    """
    from spin.alignment.models.folder import read_config_file

    config = read_config_file(model_folder)
    own = config.get("text_config", config).get("router_aux_loss_coef")
    if own and coefficient is None:
        raise InputError(
            f"the model in {model_folder} adds a load-balancing loss of its experts (router_aux_loss_coef {own}), which is not "
            "computed here: set router_aux_loss_coef: 0 to train without it"
        )
