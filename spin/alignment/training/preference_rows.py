"""Encodes a data set of preference rows that a Python user passes to SPINTrainer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import datasets

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.end_of_turn import end_ids_of
from spin.alignment.data.preferences import to_preferences
from spin.alignment.data.template_date import pinned_date
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.forward import causal_model
from spin.alignment.models.folder import check_config_fits
from spin.alignment.training.preference_data import check_budget, encode_rows, largest

if TYPE_CHECKING:
    from spin.alignment.training.config import SPINConfig

logger = logging.getLogger(__name__)


def has_rows(dataset: Any, name: str) -> bool:
    """Return whether a trainer was given rows that still have to be encoded.

    Raises:
        InputError: the rows are not a single ``datasets.Dataset``.
    """
    if isinstance(dataset, datasets.IterableDataset | datasets.DatasetDict | list | dict):
        raise InputError(
            f"{name} is a {type(dataset).__name__}: pass one datasets.Dataset (Dataset.from_list builds it from a list of rows)"
        )
    return isinstance(dataset, datasets.Dataset)


def args_encoder(args: SPINConfig, tokenizer: Any, model: Any) -> ChatEncoder:
    """Return the chat encoder of a trainer's tokenizer and model, with the template settings in ``args``."""
    generation = getattr(causal_model(model), "generation_config", None)
    return ChatEncoder(
        tokenizer,
        args.system,
        chat_template_kwargs=args.chat_template_kwargs,
        date=pinned_date(args.template_date, ()),
        end_ids=end_ids_of(getattr(generation, "eos_token_id", None)),
    )


def to_pairs(dataset: Any, name: str, args: SPINConfig, tokenizer: Any, model: Any) -> Any:
    """Return the encoded pairs of a ``datasets.Dataset`` of preference rows, truncated to the limits in ``args``; anything else
    that the trainer accepts (encoded pairs, None) is returned unchanged.

    The rows are in the project's format or in one of TRL's (see :func:`to_preferences`). Pairs that cannot be trained on, such
    as those with an empty response, are dropped; their number and the reason are logged.

    Args:
        name: the parameter that the rows were passed as, for messages.

    Raises:
        InputError: an unsupported kind of data set, an invalid row, a missing column that the loss reads, or a pair that
            does not fit into the model or into ``max_tokens_per_batch``.
    """
    if not has_rows(dataset, name):
        return dataset
    rows = to_preferences(dataset, name)
    # A column of the data with this name has nothing to do with training.
    rows = rows.remove_columns([column for column in rows.column_names if column == "source"])
    rows = rows.add_column("source", [name] * len(rows))
    encoder = args_encoder(args, tokenizer, model)
    encoded, account = encode_rows(rows, encoder, args.limits, args.loss_type, args.reverse)
    for reason, count in account.dropped.items():
        logger.warning("%s: %d of %d pairs dropped: %s", name, count, len(rows), reason)
    pairs = {name: encoded}
    check_config_fits(causal_model(model).config.to_dict(), "the model", *largest(pairs))
    check_budget(pairs, args)
    return PairDataset(encoded)
