"""Converts foreign SFT data to prompts and ground truth: reading, subset, held-out split, writing."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, recorded, setting
from spin.alignment.data.column_mapping import column_mapping, with_columns
from spin.alignment.data.source_names import is_local, name_and_config, with_config

if TYPE_CHECKING:
    import numpy as np

    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.formats import Conversation
    from spin.alignment.data.rows import Features


@dataclass(frozen=True, kw_only=True)
class ReformatConfig:
    """Turn foreign SFT data into prompts with their ground truth."""

    data: str = setting(
        help="Hub name, folder (save_to_disk and cloned repositories too), or file (docs/data_format.md)", path="input"
    )
    output_dir: str = setting(help="folder for {split}.parquet and test.parquet", path="folder")
    split: str = setting(
        "train", "split of the source to read, and name of the file written", path="name", recorded=True
    )
    config: str | None = setting(
        None, "configuration of the data set, such as main of openai/gsm8k; or write NAME:main as data"
    )
    columns: dict[str, str] = setting(
        {},
        "columns of the source under the names of a known format, such as prompt=query response=extra.solution; applied before "
        "the format is recognised",
    )
    test_size: float = setting(0.0, "rows held out (a number, or a proportion below 1)", ge=0, recorded=True)
    subset: int = setting(0, "random subset of this many training rows (0: all)", ge=0, recorded=True)
    seed: int = setting(42, "seed of the subset and of the test split", recorded=True)
    turns: Literal["last", "all"] = setting("last", "assistant turns that become ground truth", recorded=True)
    skip_invalid: bool = setting(False, "skip rows that break the contract, and report them", recorded=True)
    allow_prompts: bool = setting(False, "keep rows without an answer, as prompts without ground truth")
    ignore_columns: list[str] = setting([], "columns of the source to leave out, for instance one that is refused")
    overwrite: bool = setting(False, "replace a different data set in the output folder")

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "data", with_config(self.data, self.config))
        object.__setattr__(self, "columns", column_mapping(self.columns))
        if not (self.test_size < 1 or self.test_size.is_integer()):
            raise InputError(f"test_size is {self.test_size:g}: give a whole number of rows, or a proportion below 1")
        if self.test_size and self.split == "test":
            raise InputError("split 'test' cannot hold out a test split of its own: set test_size to 0")
        local, folder = Path(name_and_config(self.data)[0]), Path(self.output_dir)
        if is_local(self.data) and local.is_dir() and local.resolve() == folder.resolve():
            raise InputError(f"output_dir is the folder of the data, {folder}: choose another one")
        written = [folder / f"{self.split}.parquet"] + ([folder / "test.parquet"] if self.test_size else [])
        if local.is_file() and local.resolve() in [path.resolve() for path in written]:
            raise InputError(f"data {local} would be replaced by the result: choose another output_dir")


def reformat(config: ReformatConfig) -> dict[str, Path]:
    """Write the prompts of a data set; return the files, ``train`` and, with a test size, ``test``.

    Raises:
        InputError: a row breaks the contract, an id is not unique, or the output folder contains a different data set.
    """
    from spin.alignment.data.data_card import PROMPTS, write_data_card

    folder = Path(config.output_dir)
    paths = {"train": folder / f"{config.split}.parquet"}
    if config.test_size:
        paths["test"] = folder / "test.parquet"
    provenance = make_provenance(config, paths)
    held_out = stale_test_split(folder, config.split) if "test" not in paths else None
    if held_out is not None and not config.overwrite:
        raise InputError(
            f"{held_out} was held out from an earlier data set: choose another output_dir or pass --overwrite, which removes it"
        )
    if not config.overwrite and already_there(paths, provenance):
        from spin.alignment.core.parquet import open_parquet

        rows = {path.name: open_parquet(path).metadata.num_rows for path in paths.values()}
        say(f"{folder} is already complete: {rows}")
        write_data_card(folder, {}, PROMPTS)  # an interrupted run may have left none
        return paths
    source = Source(config)
    selection = select(source, config.seed, config.test_size, config.subset)
    write(source, selection, config.seed, paths, provenance)
    if held_out is not None:
        held_out.unlink()
    write_data_card(folder, {}, PROMPTS)
    tell_result(source, selection, folder)
    return paths


def make_provenance(config: ReformatConfig, paths: dict[str, Path]) -> dict[str, Provenance]:
    """Return the provenance of each output file: the settings, and a hash of the input files."""
    from spin.alignment.core.provenance import Provenance, hash_text
    from spin.alignment.data.source_files import split_files

    content = hash_text(config.data)
    if is_local(config.data):
        content = source_hash(split_files(config.data, config.split))
    settings = recorded(config)
    # Recorded only where they are used, so that the outputs of earlier versions are still recognised.
    settings |= {
        name: getattr(config, name) for name in ("columns", "allow_prompts", "ignore_columns") if getattr(config, name)
    }
    return {
        name: Provenance("prompts", sampling=settings, prompts_hash=content, split=path.stem)
        for name, path in paths.items()
    }


def tell_result(source: Source, selection: Selection, folder: Path) -> None:
    """Report how many rows were read, dropped and written."""
    repeated = selection.num_rows - len(selection.prompts)
    unused = len(selection.prompts) - selection.num_train - selection.num_test
    say(
        f"{selection.num_rows} rows read, {repeated} duplicate prompts removed, {len(source.invalid)} invalid rows skipped, "
        f"{unused} not in the subset; wrote {selection.num_train} training and {selection.num_test} test rows to {folder}"
    )
    for reason in source.invalid[:5]:
        say(f"  skipped: {reason}")
    source.notes.tell(source.data)


class Source:
    """The conversations of the input, read again in each pass.

    Attributes:
        invalid: why rows were skipped in the last pass.
        notes: what else the rows contain.
    """

    def __init__(self, config: ReformatConfig) -> None:
        from spin.alignment.data.columns import RowNotes

        self.config, self.data = config, config.data
        self.invalid: list[str] = []
        self.notes = RowNotes()

    def conversations(self) -> Iterator[tuple[str, Conversation]]:
        from spin.alignment.data.columns import RowNotes
        from spin.alignment.data.formats import to_conversations
        from spin.alignment.data.source_files import read_records

        self.invalid, self.notes = [], RowNotes()
        config, left_out = self.config, {*self.config.ignore_columns}
        unseen = {*left_out}
        for where, record in read_records(config.data, config.split):
            unseen -= record.keys()
            row = {name: value for name, value in record.items() if name not in left_out} if left_out else record
            try:
                renamed = with_columns(row, config.columns, where)
                found = to_conversations(renamed, where, config.turns, not config.allow_prompts, self.notes)
            except InputError as error:
                if not config.skip_invalid:
                    raise
                self.invalid.append(str(error))
                continue
            for conversation in found:
                yield where, conversation
        if unseen:
            raise InputError(f"{config.data} has no column {', '.join(sorted(unseen))}: correct ignore_columns")


@dataclass(frozen=True)
class Selection:
    """Which distinct prompts go where: sorted by opening, the first ``num_test`` are held out, the next ``num_train`` trained on.

    ``prompts`` (sorted hashes) and ``places`` (their ranks) have the shape (distinct prompts,). ``features`` are the optional
    fields and columns that some row has.
    """

    prompts: np.ndarray
    places: np.ndarray
    num_test: int
    num_train: int
    num_rows: int
    features: Features

    def place(self, prompt: int) -> int:
        """Return the rank of the prompt with this hash in the order of the openings."""
        import numpy as np

        return int(self.places[np.searchsorted(self.prompts, np.uint64(prompt))])


def keyed_hash(seed: int, text: str) -> int:
    """Return a 64-bit hash of a text that differs between seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x00{text}".encode(), digest_size=8).digest(), "big")


def prompt_key(seed: int, conversation: Conversation) -> int:
    """Return the hash that identifies duplicate prompts."""
    return keyed_hash(seed, conversation.hash)


def opening_key(seed: int, conversation: Conversation) -> int:
    """Return the hash of everything before the first answer; it determines subset and test split."""
    from spin.alignment.data.turns import prompt_hash

    roles = [message["role"] for message in conversation.messages]
    opening = conversation.messages[: roles.index("assistant")] if "assistant" in roles else conversation.messages
    return keyed_hash(seed, prompt_hash(opening, conversation.tools, conversation.chat_template_kwargs))


def select(source: Source, seed: int, test_size: float, subset: int) -> Selection:
    """First pass: rank every prompt, check that ids are unique, and draw the test split and the subset."""
    import numpy as np

    from spin.alignment.data.rows import Features

    prompts, openings, ids = array("Q"), array("Q"), array("Q")
    features = Features()
    for _, conversation in source.conversations():
        prompts.append(prompt_key(seed, conversation))
        openings.append(opening_key(seed, conversation))
        ids.append(keyed_hash(seed, conversation.prompt_id))
        features.add(conversation.row())
    if not prompts:
        reason = "all have the label false" if source.notes.label_false else "it is empty"
        raise InputError(f"{source.data} has no usable row: {source.invalid[0] if source.invalid else reason}")
    unique, first = np.unique(np.frombuffer(prompts, dtype=np.uint64), return_index=True)
    kept_ids, counts = np.unique(np.frombuffer(ids, dtype=np.uint64)[first], return_counts=True)
    if (counts > 1).any():
        _name_shared_id(source, seed, {int(value) for value in kept_ids[counts > 1]})
    # (distinct prompts,): the hash of the opening of each.
    kept_openings = np.frombuffer(openings, dtype=np.uint64)[first]
    # By opening, then by prompt: prompts that share an opening are neighbours and can stay on one side of the split.
    order = np.lexsort((unique, kept_openings))
    num_test = round(test_size * len(unique)) if test_size < 1 else int(test_size)
    if 0 < num_test < len(unique):  # all prompts of the last opening go to the test split
        last = kept_openings[order[num_test - 1]]
        num_test = int(np.searchsorted(kept_openings[order], last, side="right"))
    num_train = min(subset, len(unique) - num_test) if subset else len(unique) - num_test
    if num_train < 1 or (test_size and num_test < 1):
        raise InputError(
            f"test_size {test_size:g} of {len(unique)} distinct prompts leaves {max(num_train, 0)} for training and "
            f"{num_test} for the test split: choose another size"
        )
    places = np.empty(len(unique), dtype=np.uint64)
    places[order] = np.arange(len(unique), dtype=np.uint64)
    return Selection(unique, places, num_test, num_train, len(prompts), features)


def _name_shared_id(source: Source, seed: int, shared: set[int]) -> None:
    for where, conversation in source.conversations():
        if keyed_hash(seed, conversation.prompt_id) in shared:
            raise InputError(
                f"{where}: the id '{conversation.prompt_id}' belongs to several different prompts: make the ids unique "
                "or remove the column"
            )


def write(
    source: Source, selection: Selection, seed: int, paths: dict[str, Path], provenance: dict[str, Provenance]
) -> None:
    """Second pass: stream the selected conversations into their files; the training file appears last."""
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from spin.alignment.core.files import remove_leftovers
    from spin.alignment.core.parquet import ParquetSink
    from spin.alignment.data.rows import PROMPT_SCHEMA

    remove_leftovers(*paths.values())
    schema = selection.features.extend(PROMPT_SCHEMA)
    written = np.zeros(len(selection.prompts), dtype=bool)
    with ExitStack() as stack:
        # Contexts exit in reverse order: the training file, entered first, appears last and marks completion.
        sinks = {
            name: stack.enter_context(ParquetSink(paths[name], schema, provenance[name]))
            for name in sorted(paths, key="test".__eq__)
        }
        batches: dict[str, list[dict[str, Any]]] = {name: [] for name in sinks}
        bar = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
        rows = track(source.conversations(), "reformat", total=selection.num_rows, **bar)  # type: ignore[arg-type]
        for _, conversation in rows:
            place = selection.place(prompt_key(seed, conversation))
            if written[place] or place >= selection.num_test + selection.num_train:
                continue
            written[place] = True
            name = "test" if place < selection.num_test else "train"
            batches[name].append(conversation.row())
            if len(batches[name]) == 1000:
                sinks[name].write(batches[name])
                batches[name] = []
        for name, batch in batches.items():
            sinks[name].write(batch)
        # Removed before any new file appears: an old training file must never exist next to a new test split.
        paths["train"].unlink(missing_ok=True)


def stale_test_split(folder: Path, split: str) -> Path | None:
    """Return the test file that an earlier run held out from this split, if any: its rows may now be in the training file."""
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    path = folder / "test.parquet"
    if split == "test" or not path.exists():
        return None
    settings = read_provenance(open_parquet(path).schema_arrow, path).sampling
    return path if settings.get("test_size") and settings.get("split") == split else None


def source_hash(files: list[Path]) -> str:
    """Return one hash of the input files' contents."""
    from spin.alignment.core.provenance import hash_file, hash_text

    return hash_text(*(hash_file(file) for file in files))


def already_there(paths: dict[str, Path], provenance: dict[str, Provenance]) -> bool:
    """Return whether every output exists and was created from the same input and settings.

    Raises:
        InputError: an output exists but was created from other inputs or settings.
    """
    from spin.alignment.core.parquet import open_parquet
    from spin.alignment.core.provenance import read_provenance

    for name, path in paths.items():
        if path.exists():
            differences = provenance[name].differences(read_provenance(open_parquet(path).schema_arrow, path))
            if differences:
                raise InputError(
                    f"{path} contains different data ({'; '.join(differences)}): choose another output_dir or pass --overwrite"
                )
    return all(path.exists() for path in paths.values())
