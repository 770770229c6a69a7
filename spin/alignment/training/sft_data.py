"""Encodes prompts with their ground truth for SFT."""

from __future__ import annotations

from pathlib import Path
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
    """Encode prompts with their ground truth; return rows of ``prompt_ids`` and ``response_ids`` with their origin, and the
    account of all rows and tokens read.

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
        account.keep(len(pair.prompt_ids) + len(pair.chosen_ids), pair.truncated)
        ids = {"prompt_ids": pair.prompt_ids, "response_ids": pair.chosen_ids}
        rows.append({"prompt_id": row["prompt_id"], "source": source} | ids)
    if not rows:
        reasons = dict(account.dropped)
        raise InputError(f"{source}: no row remains to train on ({reasons}): check the data, or raise max_length")
    account.check(len(rows), sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows))
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


def check_row_lengths(rows: Dataset, split: str, budget: int | None) -> tuple[int, int]:
    """Return the length (tokens) of the longest encoded row, and the largest token id. ``budget`` is that of a micro-batch.

    Raises:
        InputError: the longest row does not fit into a micro-batch.
    """
    import pyarrow.compute as pc

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
