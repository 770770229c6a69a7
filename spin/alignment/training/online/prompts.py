"""The prompts of online training: encoded once; prompts that are too long are skipped and counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_text
from spin.alignment.data.chat_encoder import RowRefused, template_arguments
from spin.alignment.data.held_out_rows import check_any_left, describe_skipped, read_held_out
from spin.alignment.data.mixture import pieces_of
from spin.alignment.data.rows import carried_columns, load_prompts, prompts_hash, scorer_columns, to_prompt_rows
from spin.alignment.data.turns import answer_text, present_fields
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.methods.pairings import find_pairing, missing_ground_truth
from spin.alignment.rewards import check_columns, needs_reference, no_reference
from spin.alignment.training.preference_rows import has_rows

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.training.online.config import OnlineConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnlinePrompt:
    """One prompt: its ids (including the generation prompt), its turns, and the conversation with the ground truth, if any.

    ``ground_truth_ids`` are truncated to ``max_length`` as in offline training; empty if the ground truth is not trained on.
    ``carried`` are the columns of the row that the template or a scorer reads (``CARRIED_COLUMNS``).
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    messages: list[dict[str, str]]
    ground_truth: list[dict[str, str]] | None
    ground_truth_ids: tuple[int, ...] = ()
    carried: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """The text of the ground truth, for the scorer."""
        return None if self.ground_truth is None else answer_text(self.ground_truth[-1])


class PromptDataset(torch.utils.data.Dataset):
    """The prompts of a split, in order; ``key`` is a hash of their content."""

    def __init__(self, prompts: Sequence[OnlinePrompt], key: str) -> None:
        self.prompts, self.key = list(prompts), key

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> OnlinePrompt:
        return self.prompts[index]


def longest_pairs(prompts: Sequence[OnlinePrompt], max_new_tokens: int, end_id: int, count: int = 64) -> PairDataset:
    """Return synthetic pairs as long as any that a step can create: the longest prompts with maximum-length responses."""
    longest = sorted((prompt.token_ids for prompt in prompts), key=len)[-count:]
    response = [end_id] * max(max_new_tokens, *(len(prompt.ground_truth_ids) for prompt in prompts))
    rows = [{"prompt_ids": list(ids), "chosen_ids": response, "rejected_ids": response} for ids in longest]
    return PairDataset(Dataset.from_list(rows))


def load_splits(
    data: DataConfig, arguments: OnlineConfig, encoder: ChatEncoder
) -> tuple[dict[str, PromptDataset], dict[str, dict[str, int]]]:
    """Load, mix and encode the prompts; return ``train`` (and ``test`` if held-out prompts are configured), and for each the
    number of skipped prompts by reason.

    Raises:
        InputError: a fraction out of range, a row that cannot be encoded, a ground truth that is missing but needed by the
            pairing, or no prompt that is short enough.
    """
    sources = [
        (
            piece.source,
            piece.selected(load_prompts(piece.source, piece.split, ground_truth_required=False), arguments.seed),
        )
        for piece in pieces_of(data.dataset_mixer, data.dataset_splits)
    ]
    splits, left_out = {}, {}
    trained_on = arguments.pairing if find_pairing(arguments.pairing).needs_ground_truth else None
    prompts = [encode(row, encoder, source, trained_on, data) for source, rows in sources for row in rows]
    splits["train"], left_out["train"] = _dataset(sources, prompts, data.max_prompt_length)
    if arguments.eval_prompts:
        splits["test"], left_out["test"] = load_held_out(arguments.eval_prompts, arguments, encoder)
    return splits, left_out


def load_held_out(path: str, arguments: OnlineConfig, encoder: ChatEncoder) -> tuple[PromptDataset, dict[str, int]]:
    """Return the held-out prompts of ``path``, at most ``eval_limit``, and the number of skipped rows by reason. They are named
    in a warning: rows that cannot be read or encoded, are too long, or lack the ground truth that the scorer compares with.

    Raises:
        InputError: the data cannot be read, or no row of it can be used.
    """
    rows, skipped = read_held_out(path, arguments.eval_split, arguments.eval_limit, ground_truth_required=False)
    prompts, compares = [], arguments.scorer is not None and needs_reference(arguments.scorer)
    for row in rows:
        try:
            prompt = encode(row, encoder, path)
            if isinstance(prompt, str):
                raise InputError(prompt)
            if len(prompt.token_ids) > arguments.max_prompt_length:
                raise InputError(f"it has {len(prompt.token_ids)} tokens: raise max_prompt_length")
            if compares and not (prompt.reference or "").strip():
                raise no_reference(arguments.scorer or "", prompt.prompt_id)
            if arguments.scorer is not None:
                check_columns(arguments.scorer, scorer_columns(row))
        except InputError as error:
            skipped.append({"prompt_id": row["prompt_id"], "reason": str(error)})
        else:
            prompts.append(prompt)
    check_any_left(prompts, skipped, f"{path}, split {arguments.eval_split}")
    for line in describe_skipped(skipped):
        logger.warning(line)
    reasons = Counter(item["reason"] for item in skipped)
    return PromptDataset(prompts, hash_text(prompts_hash(rows))), dict(reasons)


def to_prompts(dataset: Any, args: OnlineConfig, encoder: ChatEncoder, name: str) -> Any:
    """Return the encoded prompts of a ``datasets.Dataset`` (see :func:`to_prompt_rows`); anything else that the trainer accepts
    (encoded prompts, None) is returned unchanged. Skipped prompts are logged, with their number and the reason.

    Raises:
        InputError: an unsupported kind of data set, a row that cannot be encoded, or a row without the ground truth that the
            scorer or the pairing compares with.
    """
    if not has_rows(dataset, name):
        return dataset
    rows = to_prompt_rows(dataset, name)
    trained_on = args.pairing if name == "train_dataset" and find_pairing(args.pairing).needs_ground_truth else None
    prompts = [encode(row, encoder, name, trained_on, args.limits) for row in rows]
    made, left_out = _dataset([(name, rows)], prompts, args.max_prompt_length)
    for reason, count in left_out.items():
        logger.warning("%s: %d of %d prompts skipped: %s", name, count, len(rows), reason)
    check_scorable(made, args.scorer)
    return made


def check_scorable(dataset: PromptDataset, scorer: str | None) -> None:
    """Check that every prompt has what the scorer reads: the ground truth that it compares with, and its columns.

    Raises:
        InputError: a prompt lacks it; the message names the prompt.
    """
    if scorer is None:
        return
    compares = needs_reference(scorer)
    for prompt in dataset.prompts:
        if compares and not (prompt.reference or "").strip():
            raise no_reference(scorer, prompt.prompt_id)
        try:
            check_columns(scorer, scorer_columns({"prompt_id": prompt.prompt_id, **prompt.carried}))
        except InputError as error:
            raise InputError(f"scorer {scorer} cannot score prompt {prompt.prompt_id}: {error}") from error


def _dataset(
    sources: Sequence[tuple[str, Iterable[Mapping[str, Any]]]], prompts: Sequence[OnlinePrompt | str], most: int
) -> tuple[PromptDataset, dict[str, int]]:
    """Return the prompts of at most ``most`` tokens, and the number of the others by reason."""
    encoded = [prompt for prompt in prompts if isinstance(prompt, OnlinePrompt)]
    short = [prompt for prompt in encoded if len(prompt.token_ids) <= most]
    left_out = Counter(prompt for prompt in prompts if isinstance(prompt, str))
    if len(short) < len(encoded):
        left_out["longer than max_prompt_length"] = len(encoded) - len(short)
    if not short and encoded:
        raise InputError(f"no prompt of {sources[0][0]} has {most} tokens or fewer: raise max_prompt_length")
    if not short:
        raise InputError(f"no prompt of {sources[0][0]} can be used: {next(iter(left_out), 'it has none')}")
    key = hash_text(*(prompts_hash(rows) for _, rows in sources))
    return PromptDataset(short, key), dict(left_out)


def encode(
    row: dict[str, Any],
    encoder: ChatEncoder,
    source: str,
    pairing: str | None = None,
    limits: DataConfig | None = None,
) -> OnlinePrompt | str:
    """Encode one prompt row, or return the reason why it has to be skipped. Its ground truth is encoded if a ``pairing`` that
    trains on it is given. A row without ground truth ends with the user's turn.

    Raises:
        InputError: the row cannot be encoded, or its ground truth is missing.
    """
    conversation = [present_fields(turn) for turn in row["chosen"]]
    ground_truth = conversation if conversation[-1]["role"] == "assistant" else None
    messages = conversation if ground_truth is None else conversation[:-1]
    if pairing is not None and ground_truth is None:
        raise missing_ground_truth(row["prompt_id"], pairing)
    ground_truth_ids: list[int] = []
    try:
        ids = encoder.prompt_ids(messages, **template_arguments(row))
        if (
            pairing is not None
            and ground_truth is not None
            and limits is not None
            and len(ids) <= limits.max_prompt_length
        ):
            whole = encoder.response_ids(ground_truth, ids, **template_arguments(row))
            ground_truth_ids = whole[: limits.max_length - len(ids)]
    except RowRefused as refused:
        return str(refused)
    except InputError as error:
        raise InputError(f"{source}, prompt {row['prompt_id']}: {error}") from error
    return OnlinePrompt(
        row["prompt_id"], tuple(ids), messages, ground_truth, tuple(ground_truth_ids), carried_columns(row)
    )
