"""Encodes prompts with their ground truth for SFT."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.settings import Settings


def encode_ground_truth(
    prompts: Dataset, encoder: ChatEncoder, settings: Settings, source: str
) -> tuple[Dataset, Counter[str]]:
    """Encode prompts with their ground truth; return rows of ``input_ids`` and ``labels`` (-100 on the prompt), and the number
    of dropped rows by reason.

    Raises:
        InputError: a row cannot be encoded, or no row remains.
    """
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import template_arguments
    from spin.alignment.data.encode_pairs import encode_pair

    rows, dropped = [], Counter[str]()
    for index, row in enumerate(prompts):
        # Encoded as a pair with a one-token rejected response, so that rows are truncated exactly as in preference training.
        stub = {"rejected": row["chosen"], "rejected_token_ids": [encoder.end_id]}
        pair_row = {"prompt_id": row["prompt_id"], "chosen": row["chosen"], **stub, **template_arguments(row)}
        try:
            pair = encode_pair(pair_row, encoder, settings.data.max_length, settings.data.max_prompt_length)
        except InputError as error:
            raise InputError(f"{source} row {index} (prompt {row['prompt_id']}): {error}") from error
        if isinstance(pair, str):
            dropped[pair] += 1
            continue
        ids = [*pair.prompt_ids, *pair.chosen_ids]
        rows.append({"input_ids": ids, "labels": [-100] * len(pair.prompt_ids) + pair.chosen_ids})
    if not rows:
        raise InputError(f"{source}: no row remains to train on ({dict(dropped)}): check the data, or raise max_length")
    return Dataset.from_list(rows), dropped


def load_ground_truth(settings: Settings, encoder: ChatEncoder) -> tuple[dict[str, Dataset], dict[str, int]]:
    """Load and mix the prompts of every data set; return the encoded splits and the number of dropped rows by reason.

    Raises:
        InputError: a data set or split is missing or named twice, a fraction is out of range, or a row cannot be encoded.
    """
    from datasets import concatenate_datasets

    from spin.alignment.data.mixture import pieces_of
    from spin.alignment.data.rows import load_prompts

    encoded: dict[str, list[Dataset]] = {}
    dropped: Counter[str] = Counter()
    for piece in pieces_of(settings.data.dataset_mixer, settings.data.dataset_splits):
        prompts = piece.selected(load_prompts(piece.source, piece.split), settings.arguments.seed)
        rows, lost = encode_ground_truth(prompts, encoder, settings, piece.source)
        encoded.setdefault(piece.use, []).append(rows)
        dropped += lost
    return {use: concatenate_datasets(parts) for use, parts in encoded.items()}, dict(dropped)
