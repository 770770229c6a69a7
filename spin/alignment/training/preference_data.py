"""Preference rows to the encoded pairs of a training: ids, token weights, labels."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.methods.labels import Label
    from spin.alignment.methods.losses import Loss
    from spin.alignment.training.config import SPINConfig
    from spin.alignment.training.settings import Settings


def encode_split(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, dict[str, int]]:
    """Encode preference rows to ids, token weights and the labels that the loss reads; return the encoded rows and how
    many were dropped for which reason. ``reverse`` lets chosen and rejected change places, with all they have.

    The encoded rows have ``prompt_ids`` and, for each response that the loss reads, ``{response}_ids``, ``{response}_weights``
    where tokens are weighted and ``{response}_{label}``.

    Raises:
        InputError: naming the row, the missing columns, or when no pair is left.
    """
    from spin.alignment.data.encode_pairs import encode_pair
    from spin.alignment.methods.losses import find_loss

    loss = find_loss(loss_type)
    check_columns(rows, loss_type, loss)
    weighted = weighted_responses(rows, loss)
    targets = {name: name for name in loss.responses}
    if reverse:
        targets |= dict(zip(SIDES, reversed(SIDES), strict=True))

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            pair = encode_pair(row, encoder, config.max_length, config.max_prompt_length, loss.responses)
            whole = None if isinstance(pair, str) else pair
            found: dict[str, Any] = {"prompt_ids": whole.prompt_ids if whole else [], "dropped": "" if whole else pair}
            for name, other in targets.items():
                ids = whole.responses[name] if whole else []
                found[f"{other}_ids"] = ids
                if name in weighted:
                    is_truncated = whole is not None and len(whole.prompt_ids) + len(ids) >= config.max_length
                    found[f"{other}_weights"] = weights_of(row, name, len(ids), is_truncated) if whole else []
                found |= {f"{other}_{label.name}": label_of(row, name, label) for label in loss.labels}
        except InputError as error:
            raise InputError(f"{row['source']} row {index} (prompt {row['prompt_id']}): {error}") from error
        return found

    workers = config.preprocessing_num_workers if len(rows) > 1000 else 1
    encoded = rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=False,
        desc="encode pairs",
    )
    dropped = Counter(reason for reason in encoded["dropped"] if reason)
    kept = [index for index, reason in enumerate(encoded["dropped"]) if not reason]
    if not kept:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise InputError(f"no pair is left to train on ({reasons}): check the data, or raise max_length")
    return encoded.select(kept).remove_columns("dropped"), dict(dropped)


def check_columns(rows: Dataset, loss_type: str, loss: Loss) -> None:
    """Check that the pairs have the responses and labels that a loss reads, and a preferred response where it needs one.

    Raises:
        InputError: naming the missing columns, and what writes them.
    """
    from spin.alignment.methods.losses import LOSSES, find_loss
    from spin.alignment.methods.pairings import PAIRINGS, find_pairing, writers

    sources = ", ".join(sorted(set(rows["source"])))
    written = {
        name: {column for label in find_pairing(name).own_labels for column in label.columns} for name in PAIRINGS
    }
    unpreferring = [
        name for name in PAIRINGS if not find_pairing(name).prefers and written[name] <= {*rows.column_names}
    ]
    if unpreferring and loss.compares:
        others = ", ".join(name for name in LOSSES if not find_loss(name).compares)
        raise InputError(
            f"the pairs in {sources} hold rewards and prefer no response (pairing {unpreferring[0]}), but loss_type {loss_type} "
            f"compares two: set loss_type: {others}, or convert the data with another pairing"
        )
    for label in loss.labels:
        missing = [name for side in loss.responses if (name := f"{side}_{label.name}") not in rows.column_names]
        if missing:
            pairings = writers(label)
            fix = f"convert the data with --pairing {pairings[0]}" if pairings else "add them as numbers"
            raise InputError(
                f"loss_type {loss_type} reads {' and '.join(missing)}, which the pairs in {sources} do not have: {fix}, or "
                "choose another loss_type"
            )
    absent = [name for name in loss.responses if name not in rows.column_names]
    if absent:
        raise InputError(
            f"loss_type {loss_type} reads a response '{absent[0]}' beside chosen and rejected, which the pairs in {sources} do "
            f"not have: convert the data with --{absent[0]}, or choose another loss_type"
        )


def weighted_responses(rows: Dataset, loss: Loss) -> list[str]:
    """Return the responses that have token weights: all that the loss reads, or none.

    Raises:
        InputError: only some of them have.
    """
    weighted = [name for name in loss.responses if f"{name}_weights" in rows.column_names]
    if weighted and len(weighted) < len(loss.responses):
        missing = next(name for name in loss.responses if name not in weighted)
        raise InputError(
            f"the pairs have {' and '.join(f'{name}_weights' for name in weighted)} but no {missing}_weights: weigh them again, "
            "or remove the column"
        )
    return weighted


def weights_of(row: dict[str, Any], side: str, count: int, is_truncated: bool = True) -> list[float]:
    """Return the weights of the ``count`` tokens of a response that are left after truncation (unless it was not cut)."""
    weights, ids = row[f"{side}_weights"], row.get(f"{side}_token_ids")
    whole = len(ids) if ids is not None else None if is_truncated else count
    if weights is None or len(weights) < count or (whole is not None and len(weights) != whole):
        found = "none" if weights is None else len(weights)
        raise InputError(
            f"{side}_weights must hold a weight for each token ({max(count, len(ids or ()))}), but there are {found}: weigh it "
            "again with spin/estimate_weights.py"
        )
    if not all(map(math.isfinite, weights[:count])):
        place = next(place for place, weight in enumerate(weights[:count]) if not math.isfinite(weight))
        raise InputError(
            f"{side}_weights is {weights[place]} at token {place}: weigh it again with a max_length as large as that of the "
            "training"
        )
    return list(weights[:count])


def label_of(row: dict[str, Any], side: str, label: Label) -> float:
    """Return a label of a response, as the label says it must be."""
    value = row[f"{side}_{label.name}"]
    if not label.allows(value):
        raise InputError(f"{side}_{label.name} is {value}, not {label.wanted}: convert the data again")
    return float(value)


def load_pairs(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Load, mix and encode the data; return the encoded splits and what was dropped from each."""
    from spin.alignment.data.preferences import mix_preferences

    check_preference(settings)
    mixed = mix_preferences(settings.data.dataset_mixer, settings.data.dataset_splits, settings.arguments.seed)
    encoded, dropped = {}, {}
    arguments = settings.arguments
    for split, rows in mixed.items():
        encoded[split], dropped[split] = encode_split(
            rows, encoder, settings.data, arguments.loss_type, arguments.reverse
        )
    return encoded, dropped


def check_preference(settings: Settings) -> None:
    """Check that the pairing of every data set prefers a response, where the loss compares two.

    Raises:
        InputError: naming the data set and its pairing.
    """
    from spin.alignment.data.preferences import conversion_record

    loss_type = settings.arguments.loss_type
    for path in settings.data.dataset_mixer if settings.arguments.loss.compares else ():
        for split in settings.data.dataset_splits:
            record = conversion_record(path, split)
            if record.get("prefers") is False:
                raise InputError(
                    f"the pairs in {path} prefer no response (pairing {record['pairing']}), but loss_type {loss_type} compares "
                    "two: choose a loss that takes each response by itself, or convert the data with another pairing"
                )


def data_key(pairs: dict[str, Dataset]) -> str:
    """Return one hash of the encoded pairs of all splits: ids, and weights and labels where there are any."""
    from spin.alignment.core.provenance import hash_text
    from spin.alignment.logprobs.reference_store import hash_tokens

    parts = []
    for split, rows in sorted(pairs.items()):
        parts.append(f"{split}={hash_tokens(rows)}")
        others = sorted(name for name in rows.column_names if not name.endswith("_ids"))
        parts += [f"{split}.{name}={hash_text(*map(str, rows[name]))}" for name in others]
    return hash_text(*parts)


def largest(pairs: dict[str, Dataset]) -> tuple[int, int]:
    """Return the length (tokens) of the longest prompt with response, and the largest token id."""
    import pyarrow.compute as pc

    from spin.alignment.logprobs.reference_store import responses_of

    length = token = 0
    for rows in pairs.values():
        table = rows.with_format("arrow")[:]
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
        InputError: naming the longest pair.
    """
    import pyarrow.compute as pc

    from spin.alignment.logprobs.reference_store import responses_of

    budget = arguments.max_tokens_per_batch
    for split, rows in pairs.items():
        if budget is None:
            continue
        table = rows.with_format("arrow")[:]
        names = responses_of(rows.column_names)
        prompt, *responses = (pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", *names))
        prompts = 1 if arguments.share_prompts else len(names)
        tokens = functools.reduce(pc.add, responses, pc.multiply(prompt, prompts))
        longest = pc.max(tokens).as_py()
        if longest > budget:
            raise InputError(
                f"max_tokens_per_batch is {budget}, but pair {pc.index(tokens, longest).as_py()} of {split} takes {longest} "
                f"tokens (prompt, {', '.join(names[:-1])} and {names[-1]}): raise it to {longest}, or lower max_length"
            )
