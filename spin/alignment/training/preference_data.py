"""Preference rows to the encoded pairs of a training: ids, token weights, labels."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.training.config import SPINConfig
    from spin.alignment.training.settings import Settings


HALVES = ("chosen", "rejected")


def encode_split(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, dict[str, int]]:
    """Encode preference rows to ids, token weights and the labels that the loss reads; return the encoded rows and how
    many were dropped for which reason. ``reverse`` lets chosen and rejected change places, with all they have.

    Raises:
        InputError: naming the row, the missing columns, or when no pair is left.
    """
    from spin.alignment.data.encode_pairs import encode_pair
    from spin.alignment.methods.losses import LOSS_COLUMNS, loss_feature

    label = LOSS_COLUMNS.get(loss_type)
    check_label_columns(rows, loss_type, label)
    weighted = [half for half in HALVES if f"{half}_weights" in rows.column_names]
    if len(weighted) == 1:
        raise InputError(f"the pairs have the column {weighted[0]}_weights alone: weigh them again, or remove it")
    targets = dict(zip(HALVES, reversed(HALVES) if reverse else HALVES, strict=True))

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            pair = encode_pair(row, encoder, config.max_length, config.max_prompt_length)
            whole = None if isinstance(pair, str) else pair
            found: dict[str, Any] = {"prompt_ids": whole.prompt_ids if whole else [], "dropped": "" if whole else pair}
            for half, other in targets.items():
                ids = getattr(whole, f"{half}_ids") if whole else []
                found[f"{other}_ids"] = ids
                if half in weighted:
                    is_cut = whole is not None and len(whole.prompt_ids) + len(ids) >= config.max_length
                    found[f"{other}_weights"] = weights_of(row, half, len(ids), is_cut) if whole else []
                if label is not None:
                    found[f"{other}_{loss_feature(label)}"] = label_of(row, f"{half}_{label}")
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


def check_label_columns(rows: Dataset, loss_type: str, label: str | None) -> None:
    """Check that the pairs have the label that a loss reads, and a preferred response where it needs one.

    Raises:
        InputError: naming the missing columns, and the pairing that writes them.
    """
    from spin.alignment.methods.pairings import PAIRINGS

    if "chosen_reward" in rows.column_names and label != "reward":
        sources = ", ".join(sorted(set(rows["source"])))
        raise InputError(
            f"the pairs in {sources} hold rewards and prefer no response (pairing every_sample), but loss_type {loss_type} "
            "compares two: set loss_type: sppo_reward, or convert the data with another pairing"
        )
    if label is None:
        return
    missing = [name for half in HALVES if (name := f"{half}_{label}") not in rows.column_names]
    if missing:
        pairing = next(name for name, found in PAIRINGS.items() if missing[0] in getattr(found, "adds", ()))
        sources = ", ".join(sorted(set(rows["source"])))
        raise InputError(
            f"loss_type {loss_type} reads {' and '.join(missing)}, which the pairs in {sources} do not have: convert the data "
            f"with --pairing {pairing}, or choose another loss_type"
        )


def weights_of(row: dict[str, Any], half: str, count: int, is_cut: bool = True) -> list[float]:
    """Return the weights of the ``count`` tokens of a response that are left after truncation (unless it was not cut)."""
    weights, ids = row[f"{half}_weights"], row.get(f"{half}_token_ids")
    whole = len(ids) if ids is not None else None if is_cut else count
    if weights is None or len(weights) < count or (whole is not None and len(weights) != whole):
        found = "none" if weights is None else len(weights)
        raise InputError(
            f"{half}_weights must hold a weight for each token ({max(count, len(ids or ()))}), but there are {found}: weigh it "
            "again with spin/estimate_weights.py"
        )
    if not all(map(math.isfinite, weights[:count])):
        place = next(place for place, weight in enumerate(weights[:count]) if not math.isfinite(weight))
        raise InputError(
            f"{half}_weights is {weights[place]} at token {place}: weigh it again with a max_length as large as that of the "
            "training"
        )
    return list(weights[:count])


def label_of(row: dict[str, Any], name: str) -> float:
    """Return a label of a response: a finite number, a probability where it is one."""
    value = row[name]
    if value is None or not math.isfinite(value) or ("win_prob" in name and not 0 <= value <= 1):
        wanted = "a probability" if "win_prob" in name else "a finite number"
        raise InputError(f"{name} is {value}, not {wanted}: convert the data again")
    return float(value)


def load_pairs(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Load, mix and encode the data; return the encoded splits and what was dropped from each."""
    from spin.alignment.data.preferences import mix_preferences

    mixed = mix_preferences(settings.data.dataset_mixer, settings.data.dataset_splits, settings.arguments.seed)
    encoded, dropped = {}, {}
    arguments = settings.arguments
    for split, rows in mixed.items():
        encoded[split], dropped[split] = encode_split(
            rows, encoder, settings.data, arguments.loss_type, arguments.reverse
        )
    return encoded, dropped


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

    length = token = 0
    for rows in pairs.values():
        table = rows.with_format("arrow")[:]
        prompts = pc.list_value_length(table["prompt_ids"])
        for half in ("chosen_ids", "rejected_ids"):
            length = max(length, pc.max(pc.add(prompts, pc.list_value_length(table[half]))).as_py())
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

    budget = arguments.max_tokens_per_batch
    prompts = 1 if arguments.share_prompts else 2
    for split, rows in pairs.items():
        if budget is None:
            continue
        table = rows.with_format("arrow")[:]
        prompt, chosen, rejected = (
            pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")
        )
        tokens = pc.add(pc.multiply(prompt, prompts), pc.add(chosen, rejected))
        longest = pc.max(tokens).as_py()
        if longest > budget:
            raise InputError(
                f"max_tokens_per_batch is {budget}, but pair {pc.index(tokens, longest).as_py()} of {split} takes {longest} "
                f"tokens (prompt, chosen and rejected): raise it to {longest}, or lower max_length"
            )
