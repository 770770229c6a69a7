"""The row format of prompts and generated responses, and reading prompts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_texts, id_number
from spin.alignment.core.sides import INITIAL
from spin.alignment.data.formats import to_conversations
from spin.alignment.data.source_files import read_records

if TYPE_CHECKING:
    from datasets import Dataset

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PROMPT_SCHEMA = pa.schema([("prompt_id", pa.string()), ("chosen", MESSAGES)])
GENERATED_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("rejected_finish_reason", pa.string()),
    ]
)
PREFERENCE_SCHEMA = GENERATED_SCHEMA
OPTIONAL_COLUMNS = {
    "chosen_token_ids": pa.list_(pa.int32()),
    "chosen_finish_reason": pa.string(),
    "chosen_weights": pa.list_(pa.float32()),
    "rejected_weights": pa.list_(pa.float32()),
    "rejected_logprobs": pa.list_(pa.float32()),
    INITIAL: MESSAGES,
    f"{INITIAL}_token_ids": pa.list_(pa.int32()),
    f"{INITIAL}_finish_reason": pa.string(),
}
# A label of a response, such as chosen_score and rejected_score.
LABEL_TYPE = pa.float64()


def stream_prompts(input_dir: str, split: str, truth_required: bool = True) -> Iterator[dict[str, Any]]:
    """Stream the prompts of a split with their ground truth: ``prompt_id`` and ``chosen``, ids unique; 8 bytes a prompt are held.

    ``input_dir`` is a folder, a file or a Hub name in the project's own form or any form that ``readers.py`` knows. Unless
    ``truth_required``, a row may have no ground truth: its ``chosen`` is then the prompt and ends with the user's turn.

    Raises:
        InputError: a row breaks the row contract, or (after the last row) two rows share a prompt id.
    """
    seen = array("Q")
    for where, record in read_records(input_dir, split):
        (conversation,) = to_conversations(record, where, truth_required=truth_required)
        seen.append(id_number(conversation.prompt_id))
        yield {"prompt_id": conversation.prompt_id, "chosen": conversation.messages}
    unique, counts = np.unique(np.frombuffer(seen, dtype=np.uint64), return_counts=True)
    if len(unique) < len(seen):
        _name_repeated(input_dir, split, truth_required, {int(number) for number in unique[counts > 1]})


def _name_repeated(input_dir: str, split: str, truth_required: bool, numbers: set[int]) -> None:
    places: dict[str, str] = {}
    for where, record in read_records(input_dir, split):
        (conversation,) = to_conversations(record, where, truth_required=truth_required)
        if id_number(conversation.prompt_id) not in numbers:
            continue
        earlier = places.setdefault(conversation.prompt_id, where)
        if earlier != where:
            raise InputError(
                f"{where} and {earlier} share the prompt id {conversation.prompt_id}: run spin/reformat.py, which "
                "removes repeated prompts"
            )
    raise RuntimeError("two prompt ids have the same 64-bit number, but no id stands twice")


def load_prompts(input_dir: str, split: str, truth_required: bool = True) -> Dataset:
    """Load the prompts of a split into memory (see :func:`stream_prompts`)."""
    from datasets import Dataset, Features, Value

    features = Features(
        {"prompt_id": Value("string"), "chosen": [{"role": Value("string"), "content": Value("string")}]}
    )
    return Dataset.from_list(list(stream_prompts(input_dir, split, truth_required)), features=features)


def prompt_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a prompt row, in order: what a hash of the prompts is made of."""
    yield row["prompt_id"]
    for turn in row["chosen"]:
        yield from (turn["role"], turn["content"])


def prompts_hash(prompts: Iterable[Mapping[str, Any]]) -> str:
    """Return one hash of the ids and conversations of prompt rows, in order."""
    return hash_texts(text for row in prompts for text in prompt_texts(row))
