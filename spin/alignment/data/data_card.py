"""The data card of a folder of preference pairs, from which ``datasets.load_dataset`` and the Hub's viewer learn its splits."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from spin.alignment.core.cards import TAG, called, markdown_table, portable, render_card, write_card
from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import METADATA_KEY, read_provenance
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.data.split_names import PREFERENCES

_CONVERSATION = "a conversation; everything before its last turn is the prompt; the last turn is"
_COLUMNS = {
    "prompt_id": "the id in the source, or a hash of the prompt; unique per prompt",
    "sample_index": "which of the responses to the prompt",
    "chosen": f"{_CONVERSATION} the ground truth, or the better of two responses",
    "rejected": f"{_CONVERSATION} a response of the model, the worse of two",
    INITIAL: f"{_CONVERSATION} the initial model's response",
    "tools": "JSON text: the tools that the chat template receives",
    "chat_template_kwargs": "JSON text: arguments of the chat template for this row",
    "extra_columns": "JSON text: other columns of the source, for scorers",
}
# The columns that each response may have besides its conversation, and what they mean; any other is a label.
_OF_RESPONSES = {
    "token_ids": "the sampled ids of the response, which training uses as they are; null where it was not sampled",
    "finish_reason": "`stop`, or `length` if the response was truncated",
    "logprobs": "log-prob of every sampled id under the model that sampled it, in nats",
    "weights": "the weight of every token of the response in the loss",
    "gains": "how much more should be learned from a token than from others, in nats",
}
# Limits of the Hub's classes of sizes, in rows.
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The files of one split: their split's name, patterns that match them, columns, number of rows, and provenance."""

    name: str
    files: list[Path]
    patterns: list[str]
    schema: pa.Schema
    rows: int
    provenance: dict[str, Any]

    @property
    def public_name(self) -> str:
        """The split's name as ``datasets`` allows it: letters, digits and underscores."""
        return re.sub(r"\W+", "_", self.name)


def write_data_card(folder: Path, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Write the card of a folder with the pairs of some splits.

    Args:
        counts: the rows of each split by outcome (``*.counts.json``); empty if they are not known.

    Raises:
        InputError: a file of pairs is damaged.
    """
    from huggingface_hub import DatasetCardData

    splits = list(_splits_of(folder))
    total = sum(split.rows for split in splits)
    data = DatasetCardData(
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split.public_name, "path": split.patterns} for split in splits],
            }
        ],
        license="unknown",
        pretty_name="Preference pairs of self-play",
        size_categories=[next((name for limit, name in _SIZES if total < limit), "n>10M")],
        tags=[TAG, "preference", "dpo", "self-play"],
        task_categories=["text-generation"],
    )
    columns = {field.name: field.type for split in splits for field in split.schema}
    rows = [[f"`{name}`", _type_text(kind), _meaning(name)] for name, kind in columns.items()]
    write_card(
        folder,
        render_card(
            "spin.alignment.data",
            "data_card.md.jinja",
            data,
            splits_table=_splits_table(splits, counts),
            first_split=splits[0].public_name,
            columns_table=markdown_table(["column", "type", "meaning"], rows),
            records=[(split.name, _record_text(split.provenance)) for split in splits],
        ),
    )


def _splits_of(folder: Path) -> Iterator[SplitFiles]:
    files = sorted(folder.glob(f"*{PREFERENCES}*.parquet"))
    for name in dict.fromkeys(path.name.rpartition(PREFERENCES)[0] for path in files):
        own = [path for path in files if path.name.rpartition(PREFERENCES)[0] == name]
        numbered = all(re.fullmatch(r"-\d+-of-\d+", path.stem.rpartition(PREFERENCES)[2]) for path in own)
        opened = [open_parquet(path) for path in own]
        schema = opened[0].schema_arrow
        known = METADATA_KEY in (schema.metadata or {})
        yield SplitFiles(
            name=name,
            files=own,
            patterns=[f"{glob.escape(name + PREFERENCES)}-*.parquet"]
            if numbered
            else [glob.escape(p.name) for p in own],
            schema=schema,
            rows=sum(file.metadata.num_rows for file in opened),
            provenance=dataclasses.asdict(read_provenance(schema, own[0])) if known else {},
        )


def _splits_table(splits: list[SplitFiles], counts: Mapping[str, Mapping[str, int]]) -> str:
    names = list(dict.fromkeys(name for split in splits for name in counts.get(split.name, {})))
    rows = [
        [split.public_name, len(split.files), split.rows, *(counts.get(split.name, {}).get(name, "") for name in names)]
        for split in splits
    ]
    return markdown_table(["split", "files", "pairs", *names], rows)


def _type_text(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        turn = kind.value_type
        return f"list of {{{', '.join(turn.field(place).name for place in range(turn.num_fields))}}}"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _meaning(name: str) -> str:
    """Return what a column contains; one that no format knows is a label of a response, or comes from the source."""
    if name in _COLUMNS:
        return _COLUMNS[name]
    response = next((side for side in (*SIDES, INITIAL) if name.startswith(f"{side}_")), None)
    if response is None:
        return "from the source of the rows"
    kind = name.removeprefix(f"{response}_")
    return f"of `{response}`: {_OF_RESPONSES.get(kind, 'a label that a scorer or pairing gave the response')}"


def _record_text(provenance: dict[str, Any]) -> str:
    """Return a provenance record as YAML, without empty entries and without the folders above a model's."""
    kept = {key: value for key, value in provenance.items() if value not in ("", {}, [], None)}
    if "model" in kept:
        kept["model"] = called(kept["model"])
    return yaml.safe_dump(portable(kept, {}), sort_keys=False, allow_unicode=True).rstrip("\n")
