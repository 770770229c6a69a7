"""The row format: its schemas, and loading, checking and mixing of prompt rows and preference rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from spin.alignment.errors import InputError
from spin.alignment.provenance import hash_text
from spin.alignment.readers import Message, check_conversation, read_records, split_files, to_conversations
from spin.alignment.shards import open_parquet

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
}


def load_prompts(input_dir: str, split: str) -> Dataset:
    """Load the prompts of a split with their ground truth: columns ``prompt_id`` and ``chosen``, ids unique.

    ``input_dir`` is a folder, a file or a Hub name in the project's own form or any form that ``readers.py`` knows.

    Raises:
        InputError: a row breaks the row contract, or two rows share a prompt id.
    """
    from datasets import Dataset, Features, Value

    def rows() -> Iterator[dict[str, Any]]:
        seen: dict[str, str] = {}
        for where, record in read_records(input_dir, split):
            (conversation,) = to_conversations(record, where)
            earlier = seen.setdefault(conversation.prompt_id, where)
            if earlier != where:
                raise InputError(
                    f"{where} and {earlier} share the prompt id {conversation.prompt_id}: run spin/reformat.py, which "
                    "removes repeated prompts"
                )
            yield {"prompt_id": conversation.prompt_id, "chosen": conversation.messages}

    features = Features(
        {"prompt_id": Value("string"), "chosen": [{"role": Value("string"), "content": Value("string")}]}
    )
    return Dataset.from_list(list(rows()), features=features)


def prompts_hash(prompts: Dataset) -> str:
    """Return one hash of the ids and conversations of a prompt data set, in order."""
    return hash_text(
        *(
            part
            for row in prompts
            for part in (
                row["prompt_id"],
                *(text for turn in row["chosen"] for text in (turn["role"], turn["content"])),
            )
        )
    )


def split_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Return the prompt of a pair: the common prefix of both conversations, at most all but the last turn of each."""
    prompt: list[Message] = []
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        prompt.append(ours)
    return prompt


def load_preferences(path: str, split: str) -> Dataset:
    """Load preference rows of a split (``train`` and ``train_prefs`` name the same) in the format of docs/data_format.md.

    The original's ``real``/``generated`` columns and rows without token ids are accepted.

    Raises:
        InputError: a file is missing or damaged, a column is missing, or a row breaks the contract.
    """
    from datasets import Dataset

    table = pa.concat_tables(_preference_tables(path, split), promote_options="default")
    if table.num_rows == 0:
        raise InputError(f"{path} holds no pairs of the split '{split}': generate and convert some first")
    return Dataset(table)


def _preference_tables(path: str, split: str) -> list[pa.Table]:
    name = split.removesuffix("_prefs")
    if not Path(path).exists():
        return [_table(list(_checked(read_records(path, split))), path)]
    tables = []
    for file in split_files(Path(path), name):
        columns = set(open_parquet(file).schema_arrow.names) if file.suffix == ".parquet" else set()
        if {"prompt_id", "sample_index", "chosen", "rejected"} <= columns:
            table = open_parquet(file).read().replace_schema_metadata(None)
            _check_table(table, str(file))
            tables.append(table)
        else:
            tables.append(_table(list(_checked(read_records(str(file), None))), str(file)))
    return tables


def _table(rows: list[dict[str, Any]], source: str) -> pa.Table:
    if not rows:
        raise InputError(f"{source} holds no rows: generate and convert some pairs first")
    fields = {field.name: field.type for field in PREFERENCE_SCHEMA} | OPTIONAL_COLUMNS
    present = [name for name in fields if name in rows[0]]
    return pa.Table.from_pylist(rows, pa.schema([(name, fields[name]) for name in present]))


def _checked(records: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for where, record in records:
        row = dict(record)
        if "real" in row and "generated" in row:
            row["chosen"], row["rejected"] = row.pop("real"), row.pop("generated")
        if "chosen" not in row or "rejected" not in row:
            raise InputError(
                f"{where} lacks the column 'chosen' or 'rejected': convert the data with spin/convert_data.py"
            )
        check_pair(row["chosen"], row["rejected"], where)
        row.setdefault("sample_index", 0)
        if not row.get("prompt_id"):
            prompt = split_prompt(row["chosen"], row["rejected"])
            row["prompt_id"] = hash_text(*(part for turn in prompt for part in (turn["role"], turn["content"])))
        yield row


def _check_table(table: pa.Table, source: str) -> None:
    names = ["chosen", "rejected"]
    for row, pair in enumerate(table.select(names).to_pylist()):
        check_pair(pair["chosen"], pair["rejected"], f"{source} row {row}")


def check_pair(chosen: Any, rejected: Any, where: str) -> None:
    """Check one pair: two conversations that differ in their last (assistant) turn only.

    An empty rejected response is allowed here: the opponent may have answered with EOS alone.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
            raise InputError(f"{where}: '{name}' is not a list of turns: convert the data with spin/convert_data.py")
    check_conversation(chosen, where)
    if not rejected or rejected[-1]["role"] != "assistant" or list(chosen[:-1]) != list(rejected[:-1]):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' do not share one prompt: both must differ in the last turn only"
        )


def mix_preferences(dataset_mixer: Mapping[str, float], splits: Sequence[str], seed: int) -> dict[str, Dataset]:
    """Load and mix the data sets of ``dataset_mixer`` (path -> fraction of its training rows, in (0, 1]).

    Returns ``{"train": ..., "test": ...}`` as far as ``splits`` names them; test splits are taken whole, as in the
    original. A column ``source`` names the path each row came from; the training rows are shuffled with ``seed``.

    Raises:
        InputError: no data set, a fraction out of range, or an unreadable data set.
    """
    from datasets import concatenate_datasets

    if not dataset_mixer:
        raise InputError("dataset_mixer is empty: write at least one 'path: fraction' line")
    for path, fraction in dataset_mixer.items():
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise InputError(f"dataset_mixer gives {path} the fraction {fraction}: set it above 0 and at most 1")
    mixed: dict[str, Dataset] = {}
    for split in splits:
        name = "test" if split.startswith("test") else "train"
        pieces = []
        for path, fraction in dataset_mixer.items():
            rows = load_preferences(path, split)
            if name == "train" and fraction < 1:
                rows = rows.shuffle(seed=seed).select(range(max(1, int(fraction * len(rows)))))
            pieces.append(rows.add_column("source", [path] * len(rows)))
        joined = concatenate_datasets(_aligned(pieces))
        mixed[name] = joined.shuffle(seed=seed) if name == "train" else joined
    if "train" not in mixed:
        raise InputError(f"dataset_splits is {list(splits)}: name a training split such as train_prefs")
    return mixed


def _aligned(pieces: list[Dataset]) -> list[Dataset]:
    from datasets import Dataset

    columns = [{*piece.column_names} for piece in pieces]
    if all(names == columns[0] for names in columns):
        return pieces
    union = pa.concat_tables([piece.with_format("arrow")[:] for piece in pieces], promote_options="default")
    return [Dataset(union)]
