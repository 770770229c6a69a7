"""Encodes preference rows for training: token ids, token weights and labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.training.accounting import Account

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.methods.labels import Label
    from spin.alignment.methods.losses import Loss
    from spin.alignment.training.config import SPINConfig
    from spin.alignment.training.settings import Settings

# Where an encoded row comes from; not part of what is trained on.
ORIGIN = ["prompt_id", "source"]


def encode_split(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows of :func:`encode_rows` without their origin, and the number of dropped rows by reason."""
    encoded, account = encode_rows(rows, encoder, config, loss_type, reverse)
    return encoded.remove_columns(ORIGIN), dict(account.dropped)


def encode_rows(
    rows: Dataset, encoder: ChatEncoder, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> tuple[Dataset, Account]:
    """Encode preference rows to ids, token weights and the labels that the loss reads; return the encoded rows and the account
    of all rows and tokens read. ``reverse`` swaps chosen and rejected, including their token weights and labels.

    Each encoded row has the columns :data:`ORIGIN`, ``prompt_ids`` and, for each response that the loss reads,
    ``{response}_ids``, ``{response}_{label}`` and, where the rows have token weights, ``{response}_weights``.

    Raises:
        InputError: a row is invalid, columns are missing, or no pair remains.
    """
    from spin.alignment.data.encode_pairs import encode_pair
    from spin.alignment.methods.losses import find_loss

    loss = find_loss(loss_type)
    check_columns(rows, loss_type, loss)
    if config.retokenize:
        rows = without_ids(rows)
    weighted = weighted_responses(rows, loss)
    targets = {name: name for name in loss.responses}
    if reverse:
        targets |= dict(zip(SIDES, reversed(SIDES), strict=True))

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            check_stored_ids(row, loss.responses, encoder)
            pair = encode_pair(row, encoder, config.max_length, config.max_prompt_length, loss.responses)
            whole = None if isinstance(pair, str) else pair
            found: dict[str, Any] = {
                "prompt_ids": whole.prompt_ids if whole else [],
                "dropped": "" if whole else str(pair),
            }
            found |= {name: str(row[name]) for name in ORIGIN}
            found["truncated"] = list(whole.truncated) if whole else [0, 0]
            found["dropped_tokens"] = 0 if whole else getattr(pair, "tokens", 0)
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

    workers = config.preprocessing_num_workers if len(rows) > 1000 else 1  # starting workers costs more than few rows
    encoded = rows.map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=False,
        desc="encode pairs",
    )
    account = account_of(encoded, loss.responses)
    kept = [index for index, reason in enumerate(encoded["dropped"]) if not reason]
    if not kept:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in account.dropped.items())
        raise InputError(f"no pair remains to train on ({reasons}): check the data, or raise max_length")
    found = encoded.select(kept).remove_columns(["dropped", "dropped_tokens", "truncated"])
    account.check(len(found), sum(tokens_of(found, loss.responses)))
    return found, account


def tokens_of(encoded: Dataset, responses: Sequence[str]) -> list[int]:
    """Return the number of tokens of each encoded row: its prompt and all responses."""
    import pyarrow.compute as pc

    table = encoded.with_format("arrow")[:]
    lengths = [pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", *responses)]
    return functools.reduce(pc.add, lengths).to_pylist()


def account_of(encoded: Dataset, responses: Sequence[str]) -> Account:
    """Return the account of encoded rows, dropped ones included."""
    account = Account()
    columns = [encoded[name] for name in ("dropped", "dropped_tokens", "truncated")]
    for reason, lost, truncated, tokens in zip(*columns, tokens_of(encoded, responses), strict=True):
        if reason:
            account.drop(reason, lost)
        else:
            account.keep(tokens, tuple(truncated))
    return account


def check_stored_ids(row: dict[str, Any], responses: Sequence[str], encoder: ChatEncoder) -> None:
    """Check that the stored ids of some responses are their text.

    Raises:
        InputError: those of one are not.
    """
    from spin.alignment.data.stored_ids import ids_problem

    for name in responses:
        if problem := ids_problem(row, name, encoder):
            raise InputError(
                f"{problem} with the tokenizer of {encoder.name}: train the model whose tokenizer encoded them, or set "
                "retokenize: true to encode the text again"
            )


def without_ids(rows: Dataset) -> Dataset:
    """Return rows without stored token ids, so that their text is encoded.

    Raises:
        InputError: they have token weights, which belong to the stored ids.
    """
    weights = [name for name in rows.column_names if name.endswith("_weights")]
    if weights:
        raise InputError(
            f"retokenize is true, but the pairs have {' and '.join(weights)}, which belong to the stored token ids: compute them "
            "again for this model with spin/estimate_weights.py, or remove the columns"
        )
    return rows.remove_columns([name for name in rows.column_names if name.endswith("_token_ids")])


def check_columns(rows: Dataset, loss_type: str, loss: Loss) -> None:
    """Check that the pairs have the responses and labels that a loss reads, and a preference if it needs one.

    Raises:
        InputError: columns are missing; they are named, with what writes them.
    """
    from spin.alignment.methods.losses import LOSSES, find_loss
    from spin.alignment.methods.pairings import PAIRINGS, find_pairing, writers

    sources = ", ".join(sorted(set(rows["source"])))
    written = {
        name: {column for label in find_pairing(name).own_labels for column in label.columns} for name in PAIRINGS
    }
    # Such pairs are recognised by their labels: a data set alone does not name its pairing.
    unpreferring = [
        name for name in PAIRINGS if not find_pairing(name).prefers and written[name] <= {*rows.column_names}
    ]
    if unpreferring and loss.compares:
        others = ", ".join(name for name in LOSSES if not find_loss(name).compares)
        raise InputError(
            f"the pairs in {sources} have rewards but no preference (pairing {unpreferring[0]}), but loss_type {loss_type} "
            f"compares two responses: set loss_type: {others}, or convert the data with another pairing"
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
            f"loss_type {loss_type} reads a response '{absent[0]}' besides chosen and rejected, which the pairs in {sources} do "
            f"not have: convert the data with --{absent[0]}, or choose another loss_type"
        )


def weighted_responses(rows: Dataset, loss: Loss) -> list[str]:
    """Return the responses that have token weights: all that the loss reads, or none.

    Raises:
        InputError: only some of them have token weights.
    """
    weighted = [name for name in loss.responses if f"{name}_weights" in rows.column_names]
    if weighted and len(weighted) < len(loss.responses):
        missing = next(name for name in loss.responses if name not in weighted)
        raise InputError(
            f"the pairs have {' and '.join(f'{name}_weights' for name in weighted)} but no {missing}_weights: compute them "
            "again, or remove the column"
        )
    gains = [f"{name}_gains" for name in loss.responses if f"{name}_gains" in rows.column_names]
    if gains and not weighted:
        raise InputError(
            f"the pairs have gains of tokens ({' and '.join(gains)}; TIS-DPO's 'chosen_weight' and 'rejected_weight') but no "
            "weights: compute them with spin/estimate_weights.py --weighting stored_gains"
        )
    return weighted


def weights_of(row: dict[str, Any], side: str, count: int, is_truncated: bool = True) -> list[float]:
    """Return the token weights of a response, truncated like its ``count`` ids.

    Without stored ids, the full length is known only if the response is not truncated (``is_truncated`` is false).

    Raises:
        InputError: the number of weights differs from that of the tokens, or a weight is not finite.
    """
    weights, ids = row[f"{side}_weights"], row.get(f"{side}_token_ids")
    whole = len(ids) if ids is not None else None if is_truncated else count
    if weights is None or len(weights) < count or (whole is not None and len(weights) != whole):
        found = "none" if weights is None else len(weights)
        raise InputError(
            f"{side}_weights must have one weight per token ({max(count, len(ids or ()))}), but has {found}: compute them again "
            "with spin/estimate_weights.py"
        )
    if not all(map(math.isfinite, weights[:count])):
        place = next(place for place, weight in enumerate(weights[:count]) if not math.isfinite(weight))
        raise InputError(
            f"{side}_weights is {weights[place]} at token {place}: compute them again with a max_length at least as large as "
            "that of the training"
        )
    return list(weights[:count])


def label_of(row: dict[str, Any], side: str, label: Label) -> float:
    """Return the value of a response's label.

    Raises:
        InputError: the label does not allow the value.
    """
    value = row[f"{side}_{label.name}"]
    if not label.allows(value):
        raise InputError(f"{side}_{label.name} is {value}, not {label.wanted}: convert the data again")
    return float(value)


def load_pairs(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, Account]]:
    """Load, mix and encode the data; return the encoded splits and the account of each."""
    from spin.alignment.data.preferences import mix_preferences
    from spin.alignment.data.stored_ids import check_origin

    check_preference(settings)
    for path in settings.data.dataset_mixer if not settings.data.retokenize else ():
        for split in settings.data.dataset_splits:
            check_origin(path, split, encoder, ", or set retokenize: true to encode their text for this model")
    mixed = mix_preferences(settings.data.dataset_mixer, settings.data.dataset_splits, settings.arguments.seed)
    encoded, accounts = {}, {}
    arguments = settings.arguments
    for split, rows in mixed.items():
        encoded[split], accounts[split] = encode_rows(
            rows, encoder, settings.data, arguments.loss_type, arguments.reverse
        )
    return encoded, accounts


def check_preference(settings: Settings) -> None:
    """Check that the pairing of every data set states a preference if the loss compares two responses.

    Raises:
        InputError: a pairing states none; it is named with its data set.
    """
    from spin.alignment.data.preferences import conversion_record

    loss_type = settings.arguments.loss_type
    for path in settings.data.dataset_mixer if settings.arguments.loss.compares else ():
        for split in settings.data.dataset_splits:
            record = conversion_record(path, split)
            if record.get("prefers") is False:
                raise InputError(
                    f"the pairs in {path} have no preference (pairing {record['pairing']}), but loss_type {loss_type} compares "
                    "two responses: choose a loss that treats each separately, or convert the data with another pairing"
                )


def data_key(pairs: dict[str, Dataset]) -> str:
    """Return one hash of the encoded pairs of all splits: ids, and any token weights and labels."""
    from spin.alignment.core.provenance import hash_text
    from spin.alignment.logprobs.reference_store import hash_tokens

    parts = []
    for split, rows in sorted(pairs.items()):
        parts.append(f"{split}={hash_tokens(rows)}")
        others = sorted(name for name in rows.column_names if not name.endswith("_ids") and name not in ORIGIN)
        parts += [f"{split}.{name}={hash_text(*map(str, rows[name]))}" for name in others]
    return hash_text(*parts)


def largest(pairs: dict[str, Dataset]) -> tuple[int, int]:
    """Return the length (tokens) of the longest prompt plus response, and the largest token id."""
    import pyarrow.compute as pc

    from spin.alignment.logprobs.reference_store import responses_of

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
    import pyarrow.compute as pc

    from spin.alignment.logprobs.reference_store import responses_of

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
