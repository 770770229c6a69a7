"""Encodes prompts with their ground truth for SFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError
from spin.alignment.training.accounting import Account

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.settings import Settings


def encode_ground_truth(
    prompts: Dataset, encoder: ChatEncoder, settings: Settings, source: str
) -> tuple[Dataset, Account]:
    """Encode prompts with their ground truth; return rows of ``input_ids`` and ``labels`` (-100 on the prompt), and the account
    of all rows and tokens read.

    Raises:
        InputError: a row cannot be encoded, or no row remains.
    """
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import template_arguments
    from spin.alignment.data.encode_pairs import encode_pair

    rows, account = [], Account()
    for index, row in enumerate(prompts):
        try:
            # As in preference training, where the other response may shorten it further.
            pair_row = {name: row[name] for name in ("prompt_id", "chosen")} | template_arguments(row)
            pair = encode_pair(
                pair_row, encoder, settings.data.max_length, settings.data.max_prompt_length, ("chosen",)
            )
        except InputError as error:
            raise InputError(f"{source} row {index} (prompt {row['prompt_id']}): {error}") from error
        if isinstance(pair, str):
            account.drop(str(pair), getattr(pair, "tokens", 0))
            continue
        ids = [*pair.prompt_ids, *pair.chosen_ids]
        account.keep(len(ids), pair.truncated)
        rows.append({"input_ids": ids, "labels": [-100] * len(pair.prompt_ids) + pair.chosen_ids})
    if not rows:
        reasons = dict(account.dropped)
        raise InputError(f"{source}: no row remains to train on ({reasons}): check the data, or raise max_length")
    account.check(len(rows), sum(len(row["input_ids"]) for row in rows))
    return Dataset.from_list(rows), account


def load_ground_truth(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, Account]]:
    """Load and mix the prompts of every data set; return the encoded splits and the account of each.

    Raises:
        InputError: a data set or split is missing or named twice, a fraction is out of range, or a row cannot be encoded.
    """
    from datasets import concatenate_datasets

    from spin.alignment.data.mixture import pieces_of
    from spin.alignment.data.rows import load_prompts

    encoded: dict[str, list[Dataset]] = {}
    accounts: dict[str, Account] = {}
    for piece in pieces_of(settings.data.dataset_mixer, settings.data.dataset_splits):
        prompts = piece.selected(load_prompts(piece.source, piece.split), settings.arguments.seed)
        rows, account = encode_ground_truth(prompts, encoder, settings, piece.source)
        encoded.setdefault(piece.use, []).append(rows)
        accounts[piece.use] = accounts.get(piece.use, Account()) + account
    return {use: concatenate_datasets(parts) for use, parts in encoded.items()}, accounts
