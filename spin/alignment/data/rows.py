"""The row format of prompts and responses, and reading prompts."""

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


def stream_prompts(input_dir: str, split: str, ground_truth_required: bool = True) -> Iterator[dict[str, Any]]:
    """Stream the prompts of a split with their ground truth: ``prompt_id`` (unique) and ``chosen``.

    ``input_dir`` is a folder, a file or a Hub name, in the project's own format or any in ``formats.py``. Unless
    ``ground_truth_required``, a row may have no ground truth: its ``chosen`` is then the prompt and ends with a user turn.

    Raises:
        InputError: a row violates the row contract, or (after the last row) two rows share a prompt id.
    """
    seen = array("Q")  # 8 bytes per prompt, where a set of ids would take about 100
    for where, record in read_records(input_dir, split):
        (conversation,) = to_conversations(record, where, ground_truth_required=ground_truth_required)
        seen.append(id_number(conversation.prompt_id))
        yield {"prompt_id": conversation.prompt_id, "chosen": conversation.messages}
    unique, counts = np.unique(np.frombuffer(seen, dtype=np.uint64), return_counts=True)
    if len(unique) < len(seen):
        _name_repeated(input_dir, split, ground_truth_required, {int(number) for number in unique[counts > 1]})


def _name_repeated(input_dir: str, split: str, ground_truth_required: bool, numbers: set[int]) -> None:
    """Read the data a second time to find the two rows that share an id, and raise an error that names them."""
    places: dict[str, str] = {}
    for where, record in read_records(input_dir, split):
        (conversation,) = to_conversations(record, where, ground_truth_required=ground_truth_required)
        if id_number(conversation.prompt_id) not in numbers:
            continue
        earlier = places.setdefault(conversation.prompt_id, where)
        if earlier != where:
            raise InputError(
                f"{where} and {earlier} have the same prompt id {conversation.prompt_id}: run spin/reformat.py, which "
                "removes repeated prompts"
            )
    raise RuntimeError("two different prompt ids have the same 64-bit number")


def load_prompts(input_dir: str, split: str, ground_truth_required: bool = True) -> Dataset:
    """Load the prompts of a split into memory (see :func:`stream_prompts`)."""
    from datasets import Dataset, Features, Value

    features = Features(
        {"prompt_id": Value("string"), "chosen": [{"role": Value("string"), "content": Value("string")}]}
    )
    return Dataset.from_list(list(stream_prompts(input_dir, split, ground_truth_required)), features=features)


def to_prompt_rows(rows: Dataset, name: str) -> list[dict[str, Any]]:
    """Return the prompt rows of a data set in memory: ``prompt_id`` and ``chosen``, as :func:`stream_prompts` yields them.

    A row has the prompt alone (column ``prompt``, text or turns) or its ground truth too, in any form that ``formats.py`` knows.

    Raises:
        InputError: no rows, a row breaks the row contract, or two rows share a prompt id; ``name`` is the data set's in messages.
    """
    if len(rows) == 0:
        raise InputError(f"{name} has no rows: give at least one prompt")
    found: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(rows.with_format(None)):
        where = f"{name} row {number}"
        (conversation,) = to_conversations(record, where, ground_truth_required=False)
        if conversation.prompt_id in found:
            raise InputError(
                f"{where} has the prompt id {conversation.prompt_id} of an earlier row: remove one of them"
            )
        found[conversation.prompt_id] = {"prompt_id": conversation.prompt_id, "chosen": conversation.messages}
    return list(found.values())


def prompt_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a prompt row, in order: the input of :func:`prompts_hash`."""
    yield row["prompt_id"]
    for turn in row["chosen"]:
        yield from (turn["role"], turn["content"])


def prompts_hash(prompts: Iterable[Mapping[str, Any]]) -> str:
    """Return one hash of the ids and conversations of prompt rows, in order."""
    return hash_texts(text for row in prompts for text in prompt_texts(row))
