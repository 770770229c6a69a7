"""What becomes of a preference row in training: token ids, token weights and labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.data.encode_pairs import EncodedPair, pair_steps
from spin.alignment.data.encode_together import Steps, run_together
from spin.alignment.training.accounting import Account

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.methods.labels import Label
    from spin.alignment.methods.losses import Loss

# Where an encoded row comes from; not part of what is trained on.
ORIGIN = ["prompt_id", "source"]


ROWS = 500  # encoded at a time
_SHOWN_FROM = 20_000  # rows whose encoding takes long enough to report its progress


class EncodedBatch(NamedTuple):
    """Encoded rows: those that are kept, which they are (a boolean for each row given), and the account of all."""

    rows: pa.RecordBatch
    kept: np.ndarray
    account: Account


def count_encoded(result: EncodedPair | str, account: Account) -> bool:
    """Add a row to an account; return whether it is kept. ``result`` is its ids, or why it is dropped."""
    if isinstance(result, str):
        account.drop(str(result), getattr(result, "tokens", 0))
        return False
    account.keep(len(result.prompt_ids) + sum(map(len, result.responses.values())), result.truncated)
    return True


def workers_for(count: int, config: DataConfig, others_wait: bool) -> int:
    """Return the number of processes that encode ``count`` rows: at least as many as train on this machine if the others wait."""
    if count <= 1000:  # starting workers costs more
        return 1
    waiting = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if others_wait else 1
    return max(config.preprocessing_num_workers, waiting)


def progress(what: str, total: int = 0) -> Callable[[int], None]:
    """Return a function that writes about ten lines while many rows are encoded, or one every 100,000 if their number is not
    known; it is told how many are done. Any process of a training may be the one that encodes, so none is silent."""
    step = total // 10 if total >= _SHOWN_FROM else 0 if total else 100_000
    shown = 0

    def tell(done: int) -> None:
        nonlocal shown
        if step and done // step > shown:
            shown = done // step
            say_error(f"{what}: {done:,}{f' of {total:,}' if total else ''} rows")

    return tell


@dataclass(frozen=True)
class PairEncoding:
    """Encodes preference rows to ids, token weights and the labels that a loss reads.

    An encoded row has the columns :data:`ORIGIN`, ``prompt_ids`` and, for each response that the loss reads,
    ``{response}_ids``, ``{response}_{label}`` and, where the rows have token weights, ``{response}_weights``.

    Attributes:
        loss: which responses and labels are read.
        weighted: the responses with token weights.
        reverse: whether chosen and rejected are swapped, including their token weights and labels.
    """

    encoder: ChatEncoder
    config: DataConfig
    loss: Loss
    weighted: tuple[str, ...] = ()
    reverse: bool = False

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        sources: Iterable[str],
        encoder: ChatEncoder,
        config: DataConfig,
        loss_type: str,
        reverse: bool,
    ) -> PairEncoding:
        """Return the encoding of rows with these ``columns``; ``sources`` names their data sets in messages.

        Raises:
            InputError: columns that the loss reads are missing, or the rows have token weights that cannot be used.
        """
        from spin.alignment.methods.losses import find_loss

        loss = find_loss(loss_type)
        check_columns(columns, sources, loss_type, loss)
        if config.retokenize:
            check_without_weights(columns)
        return cls(encoder, config, loss, tuple(weighted_responses(columns, loss)), reverse)

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns of preference rows that are read, as far as they have them."""
        names = [*ORIGIN, "tools", "chat_template_kwargs", *self.loss.responses]
        for response in self.loss.responses:
            ids = [] if self.config.retokenize else ["token_ids"]
            labels = [label.name for label in self.loss.labels]
            names += [f"{response}_{name}" for name in (*ids, "finish_reason", "weights", *labels)]
        return frozenset(names)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of encoded rows."""
        columns: dict[str, pa.DataType] = dict.fromkeys(ORIGIN, pa.string())
        columns["prompt_ids"] = pa.list_(pa.int32())
        for name in self._targets.values():
            columns[f"{name}_ids"] = pa.list_(pa.int32())
            columns |= {f"{name}_weights": pa.list_(pa.float64())} if self.weighted else {}
            columns |= {f"{name}_{label.name}": pa.float64() for label in self.loss.labels}
        return pa.schema(columns.items())

    @cached_property
    def _targets(self) -> dict[str, str]:
        """Responses of the data -> responses in training."""
        swapped = dict(zip(SIDES, reversed(SIDES), strict=True)) if self.reverse else {}
        return {name: name for name in self.loss.responses} | swapped

    def encode(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> EncodedBatch:
        """Encode rows, all at once; ``places`` are what messages call them.

        Raises:
            InputError: a row is invalid; it is named.
        """
        results = run_together([self._steps(row) for row in rows], self.encoder.encode_all)
        account, encoded, kept = Account(), [], []
        for row, place, result in zip(rows, places, results, strict=True):
            try:
                if isinstance(result, InputError):
                    raise result
                kept.append(count_encoded(result, account))
                # The labels of a dropped row are checked too.
                labels = self._labels(row)
                if isinstance(result, EncodedPair):
                    encoded.append(self._encoded(row, result) | labels)
            except InputError as error:
                raise InputError(f"{place} (prompt {row['prompt_id']}): {error}") from error
        return EncodedBatch(pa.RecordBatch.from_pylist(encoded, self.schema), np.array(kept, bool), account)

    def _steps(self, row: Mapping[str, Any]) -> Steps[EncodedPair | str]:
        config, responses = self.config, self.loss.responses
        check_stored_ids(row, responses, self.encoder)
        return (yield from pair_steps(row, self.encoder, config.max_length, config.max_prompt_length, responses))

    def _encoded(self, row: Mapping[str, Any], pair: EncodedPair) -> dict[str, Any]:
        found: dict[str, Any] = {name: str(row[name]) for name in ORIGIN} | {"prompt_ids": pair.prompt_ids}
        for name, other in self._targets.items():
            ids = pair.responses[name]
            found[f"{other}_ids"] = ids
            if self.weighted:
                is_truncated = len(pair.prompt_ids) + len(ids) >= self.config.max_length
                found[f"{other}_weights"] = weights_of(row, name, len(ids), is_truncated)
        return found

    def _labels(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {
            f"{other}_{label.name}": label_of(row, name, label)
            for name, other in self._targets.items()
            for label in self.loss.labels
        }


def check_stored_ids(row: Mapping[str, Any], responses: Sequence[str], encoder: ChatEncoder) -> None:
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


def check_without_weights(columns: Sequence[str]) -> None:
    """Check that rows whose text is to be encoded again have no token weights.

    Raises:
        InputError: they have token weights, which belong to the stored ids.
    """
    weights = [name for name in columns if name.endswith("_weights")]
    if weights:
        raise InputError(
            f"retokenize is true, but the pairs have {' and '.join(weights)}, which belong to the stored token ids: compute them "
            "again for this model with spin/estimate_weights.py, or remove the columns"
        )


def check_columns(columns: Sequence[str], sources: Iterable[str], loss_type: str, loss: Loss) -> None:
    """Check that the pairs have the responses and labels that a loss reads, and a preference if it needs one.

    Args:
        columns: those of the pairs.
        sources: names of their data sets, for messages.

    Raises:
        InputError: columns are missing; they are named, with what writes them.
    """
    from spin.alignment.methods.losses import LOSSES, find_loss
    from spin.alignment.methods.pairings import PAIRINGS, find_pairing, writers

    named = ", ".join(sorted({*sources}))
    written = {
        name: {column for label in find_pairing(name).own_labels for column in label.columns} for name in PAIRINGS
    }
    # Such pairs are recognised by their labels: a data set alone does not name its pairing.
    unpreferring = [name for name in PAIRINGS if not find_pairing(name).prefers and written[name] <= {*columns}]
    if unpreferring and loss.compares:
        others = ", ".join(name for name in LOSSES if not find_loss(name).compares)
        raise InputError(
            f"the pairs in {named} have rewards but no preference (pairing {unpreferring[0]}), but loss_type {loss_type} "
            f"compares two responses: set loss_type: {others}, or convert the data with another pairing"
        )
    for label in loss.labels:
        missing = [name for side in loss.responses if (name := f"{side}_{label.name}") not in columns]
        if missing:
            pairings = writers(label)
            fix = f"convert the data with --pairing {pairings[0]}" if pairings else "add them as numbers"
            raise InputError(
                f"loss_type {loss_type} reads {' and '.join(missing)}, which the pairs in {named} do not have: {fix}, or "
                "choose another loss_type"
            )
    absent = [name for name in loss.responses if name not in columns]
    if absent:
        raise InputError(
            f"loss_type {loss_type} reads a response '{absent[0]}' besides chosen and rejected, which the pairs in {named} do "
            f"not have: convert the data with --{absent[0]}, or choose another loss_type"
        )


def weighted_responses(columns: Sequence[str], loss: Loss) -> list[str]:
    """Return the responses that have token weights: all that the loss reads, or none.

    Raises:
        InputError: only some of them have token weights.
    """
    weighted = [name for name in loss.responses if f"{name}_weights" in columns]
    if weighted and len(weighted) < len(loss.responses):
        missing = next(name for name in loss.responses if name not in weighted)
        raise InputError(
            f"the pairs have {' and '.join(f'{name}_weights' for name in weighted)} but no {missing}_weights: compute them "
            "again, or remove the column"
        )
    gains = [f"{name}_gains" for name in loss.responses if f"{name}_gains" in columns]
    if gains and not weighted:
        raise InputError(
            f"the pairs have gains of tokens ({' and '.join(gains)}; TIS-DPO's 'chosen_weight' and 'rejected_weight') but no "
            "weights: compute them with spin/estimate_weights.py --weighting stored_gains"
        )
    return weighted


def weights_of(row: Mapping[str, Any], side: str, count: int, is_truncated: bool = True) -> list[float]:
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


def label_of(row: Mapping[str, Any], side: str, label: Label) -> float:
    """Return the value of a response's label.

    Raises:
        InputError: the label does not allow the value.
    """
    value = row[f"{side}_{label.name}"]
    if not label.allows(value):
        raise InputError(f"{side}_{label.name} is {value}, not {label.wanted}: convert the data again")
    return float(value)
