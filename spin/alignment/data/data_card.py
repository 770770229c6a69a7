"""The data card of a folder of prompts, responses or pairs, from which ``datasets`` and the Hub's viewer learn its splits."""

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
from spin.alignment.core.errors import InputError
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
class Kind:
    """What a folder contains, and what its card says of it.

    Attributes:
        files: the name of a file without its suffix; the first group is its split. A file of any other name is not described.
        made: the kind that the provenance of the files names; empty: they need not have any.
        unit: what a row is.
        note: a sentence on what to do with the rows.
        licence: whose licence applies.
        columns: meanings that differ from those of pairs.
    """

    title: str
    intro: str
    files: str
    made: str
    unit: str
    note: str
    licence: str
    tags: tuple[str, ...]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


_GROUND_TRUTH = f"{_CONVERSATION} the ground truth"
PROMPTS = Kind(
    title="Prompts and ground truth for self-play",
    intro="Prompts with the answers that people or a data set give to them, the ground truth",
    files=r"(.+)",
    made="prompts",
    unit="prompts",
    note="`generate.py` reads this folder (`--input_dir`), and so do SFT and evaluations.",
    licence="The licence is that of the source, which these files do not record.",
    tags=("sft",),
    columns={"chosen": _GROUND_TRUTH},
)
RESPONSES = Kind(
    title="Responses of a model to its training prompts",
    intro="The ground truth of each prompt and the responses of one model, in fractions",
    files=r"(.+)-\d{5,}",
    made="generated",
    unit="responses",
    note="`convert_data.py` makes preference pairs of them (`--input_dir`).",
    licence="The licence is that of the prompts and of the model that responded, neither of which these files record.",
    tags=("self-play",),
    columns={
        "chosen": f"{_GROUND_TRUTH}; null if the prompt has none",
        "rejected": f"{_CONVERSATION} the model's response",
    },
)
PAIRS = Kind(
    title="Preference pairs of self-play",
    intro="Pairs of responses to the same prompts, one chosen and one rejected",
    files=rf"(.*){PREFERENCES}(?:-\d+-of-\d+)?",
    made="",
    unit="pairs",
    note="TRL's `DPOTrainer` takes these rows as they are.",
    licence=RESPONSES.licence,
    tags=("preference", "dpo", "self-play"),
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


def write_data_card(folder: Path, counts: Mapping[str, Mapping[str, int]], kind: Kind = PAIRS) -> None:
    """Write the card of a folder with some splits.

    Args:
        counts: the rows of each split by outcome (``*.counts.json``); empty if they are not known.

    Raises:
        InputError: a file of pairs is damaged.
    """
    from huggingface_hub import DatasetCardData

    splits = list(_splits_of(folder, kind))
    total = sum(split.rows for split in splits)
    data = DatasetCardData(
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split.public_name, "path": split.patterns} for split in splits],
            }
        ],
        license="unknown",
        pretty_name=kind.title,
        size_categories=[next((name for limit, name in _SIZES if total < limit), "n>10M")],
        tags=[TAG, *kind.tags],
        task_categories=["text-generation"],
    )
    columns = {field.name: field.type for split in splits for field in split.schema}
    rows = [[f"`{name}`", _type_text(type_), _meaning(name, kind)] for name, type_ in columns.items()]
    write_card(
        folder,
        render_card(
            "spin.alignment.data",
            "data_card.md.jinja",
            data,
            kind=kind,
            splits_table=_splits_table(splits, counts, kind.unit),
            first_split=splits[0].public_name,
            columns_table=markdown_table(["column", "type", "meaning"], rows),
            records=[(split.name, _record_text(split.provenance)) for split in splits],
        ),
    )


def _splits_of(folder: Path, kind: Kind) -> Iterator[SplitFiles]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        match = re.fullmatch(kind.files, path.stem)
        if match and (not kind.made or _made_as(path) == kind.made):
            found.setdefault(match[1], []).append(path)
    for name, own in found.items():
        opened = [open_parquet(path) for path in own]
        schema = opened[0].schema_arrow
        known = METADATA_KEY in (schema.metadata or {})
        yield SplitFiles(
            name=name,
            files=own,
            patterns=_patterns(own),
            schema=schema,
            rows=sum(file.metadata.num_rows for file in opened),
            provenance=dataclasses.asdict(read_provenance(schema, own[0])) if known else {},
        )


def _made_as(path: Path) -> str:
    """Return the kind that a file's provenance names; empty without one, or if it is not a whole parquet file."""
    try:
        return read_provenance(open_parquet(path).schema_arrow, path).kind
    except InputError:
        return ""


def _patterns(files: list[Path]) -> list[str]:
    """Return patterns that match the files of a split: one for numbered files, of which there may be thousands."""
    starts = {re.sub(r"-\d+(-of-\d+)?$", "", path.stem) for path in files}
    if len(starts) == 1 and all(path.stem not in starts for path in files):
        return [f"{glob.escape(starts.pop())}-[0-9]*.parquet"]
    return [glob.escape(path.name) for path in files]


def _splits_table(splits: list[SplitFiles], counts: Mapping[str, Mapping[str, int]], unit: str) -> str:
    names = list(dict.fromkeys(name for split in splits for name in counts.get(split.name, {})))
    rows = [
        [split.public_name, len(split.files), split.rows, *(counts.get(split.name, {}).get(name, "") for name in names)]
        for split in splits
    ]
    return markdown_table(["split", "files", unit, *names], rows)


def _type_text(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        turn = kind.value_type
        return f"list of {{{', '.join(turn.field(place).name for place in range(turn.num_fields))}}}"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _meaning(name: str, kind: Kind) -> str:
    """Return what a column contains; one that no format knows is a label of a response, or comes from the source."""
    if known := kind.columns.get(name) or _COLUMNS.get(name):
        return known
    response = next((side for side in (*SIDES, INITIAL) if name.startswith(f"{side}_")), None)
    if response is None:
        return "from the source of the rows"
    what = name.removeprefix(f"{response}_")
    return f"of `{response}`: {_OF_RESPONSES.get(what, 'a label that a scorer or pairing gave the response')}"


def _record_text(provenance: dict[str, Any]) -> str:
    """Return a provenance record as YAML, without empty entries and without the folders above a model's."""
    kept = {key: value for key, value in provenance.items() if value not in ("", {}, [], None)}
    if "model" in kept:
        kept["model"] = called(kept["model"])
    return yaml.safe_dump(portable(kept, {}), sort_keys=False, allow_unicode=True).rstrip("\n")
