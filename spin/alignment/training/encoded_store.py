"""Encoded rows on disk, written once on each machine and memory-mapped by every process that trains on them.

A store is a folder named after a hash of all that decides its rows: the content of the data files, the tokenizer, the template,
the settings that matter, and the code that encodes. It has an Arrow file for each split, and ``store.json``, written last, which
also has the remarks about the data: the first process of every training writes them. The process that finds no store makes it,
under a lock that the kernel releases if it is killed; the others wait. The folders are in ``selfplay-spin`` among the Arrow files
of ``datasets`` (``HF_DATASETS_CACHE``) and may be removed at any time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.arrow_rows import joined_batches, rows_in_order
from spin.alignment.core.console import say_error
from spin.alignment.core.content_hash import content_hash, is_damaged, sealed_file
from spin.alignment.core.files import explained_os_errors
from spin.alignment.core.launcher import is_main_process
from spin.alignment.core.lock import LOCK_NAME, is_locked, waiting_lock
from spin.alignment.core.paths import check_output_folder
from spin.alignment.core.provenance import hash_file, hash_json
from spin.alignment.core.remarks import kept_remarks, remark
from spin.alignment.data.source_files import split_files
from spin.alignment.data.source_names import is_local
from spin.alignment.training.accounting import Account

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.data.mixture import Piece

_RECORD = "store.json"
_KEPT_DAYS = 30  # since a store was last used
_CACHE_NAME = "the cache of datasets (HF_DATASETS_CACHE)"
_CODE = ("data", "training")  # packages that decide how rows are encoded
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class EncodedSplit:
    """Encoded rows, the account of all rows and tokens read, and the hashes of their content by name."""

    rows: Dataset
    account: Account
    hashes: Mapping[str, str]


# Writes the Arrow file of each split to a folder; returns the account and the hashes of each.
Maker = Callable[[Path], Mapping[str, tuple[Account, Mapping[str, str]]]]


def encoded_splits(
    pieces: Sequence[Piece], encoder: ChatEncoder, data: DataConfig, key: Mapping[str, Any], make: Maker
) -> dict[str, EncodedSplit]:
    """Return the splits that ``make`` encodes from ``pieces``: from the store of this machine if all of them are local files, and
    otherwise from a store of this process alone.

    Args:
        key: all that decides the rows besides the files, the encoder, the lengths and the program, as JSON.

    Raises:
        InputError: as :func:`open_store`.
    """
    if not is_shared(data):
        return private_store(make)
    files = [
        [*astuple(piece), {str(file): content_hash(file) for file in split_files(piece.source, piece.split)}]
        for piece in pieces
    ]
    # The encoder's name is in reasons why rows are dropped.
    decides = {
        "data": files,
        "encoder": [encoder.name, encoder.fingerprint, encoder.stop_ids],
        "lengths": [data.max_length, data.max_prompt_length],
    }
    return open_store({**key, **decides}, make)


def is_shared(data: DataConfig) -> bool:
    """Return whether the processes of a machine share a store of the data, which one of them makes while the others wait."""
    return all(map(is_local, data.dataset_mixer))


def open_store(key: Mapping[str, Any], make: Maker) -> dict[str, EncodedSplit]:
    """Return the splits of the store with this key, which ``make`` writes if there is none or it is damaged.

    Several processes may call it at once; one of them makes the store.

    Args:
        key: all that decides the rows, as JSON, except for the program.

    Raises:
        InputError: the folder cannot be written, the disk is full, or ``make`` raises it.
    """
    key = json.loads(json.dumps({**key, **_code_key()}))
    cache = cache_folder()
    folder = cache / hash_json(key)
    if found := _opened(folder, key):
        return found
    check_output_folder(cache, _CACHE_NAME)
    with waiting_lock(folder, lambda: say_error(f"waiting for the process that encodes the data ({folder})")):
        if found := _opened(folder, key):
            return found
        if (folder / _RECORD).exists():
            say_error(f"{folder} is damaged: the data is encoded again")
        _clear(folder)
        try:
            _write(folder, key, make)
        except BaseException:
            _clear(folder)
            raise
        _remove_unused(cache)
        found = _opened(folder, key)
    if found is None:
        raise RuntimeError(f"{folder} cannot be read back")
    return found


def private_store(make: Maker) -> dict[str, EncodedSplit]:
    """Return the splits that ``make`` writes, in a store of this process alone: for data without files to tell it by."""
    cache = cache_folder()
    check_output_folder(cache, _CACHE_NAME)
    with explained_os_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="private-", dir=cache))
    try:
        _write(folder, {}, make)
        found = _opened(folder, {})
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays readable
    if found is None:
        raise RuntimeError(f"{folder} cannot be read back")
    return found


def cache_folder() -> Path:
    """Return the folder of all stores."""
    import datasets

    # The variable is read now: a process that was forked from another one imported datasets with that one's.
    parent = os.environ.get("HF_DATASETS_CACHE") or datasets.config.HF_DATASETS_CACHE
    return Path(parent).expanduser() / "selfplay-spin"


def split_path(folder: Path, split: str) -> Path:
    """Return the file of a split in the folder of a store."""
    return folder / f"{split}.arrow"


def read_split(folder: Path, split: str) -> Dataset:
    """Return the memory-mapped rows of a split in the folder of a store."""
    from datasets import Dataset

    return Dataset.from_file(str(split_path(folder, split)))


@functools.lru_cache(maxsize=1)
def _code_key() -> dict[str, Any]:
    root = Path(__file__).parent.parent
    files = sorted(file for package in _CODE for file in (root / package).glob("*.py"))
    code = hash_json([hash_file(file) for file in files])
    return {"code": code, "versions": {name: metadata.version(name) for name in _LIBRARIES}}


def _opened(folder: Path, key: Mapping[str, Any]) -> dict[str, EncodedSplit] | None:
    """Return the splits of a store, and say what was said when it was made; None if it does not exist or is damaged."""
    record_path = folder / _RECORD
    if not record_path.exists():
        return None
    found = {}
    try:
        record = json.loads(record_path.read_bytes())
        if is_damaged(record_path) or record["key"] != key:
            return None
        for split, facts in record["splits"].items():
            if is_damaged(split_path(folder, split)):
                return None
            rows = read_split(folder, split)
            found[split] = EncodedSplit(rows, Account.from_record(facts["account"]), facts["hashes"])
            if len(rows) != found[split].account.kept:
                return None
        remarks = [str(line) for line in record["remarks"]]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):  # for _remove_unused(); the folder may be read-only
        os.utime(record_path)
    for line in remarks if is_main_process() else ():
        remark(line)
    return found


def _write(folder: Path, key: Mapping[str, Any], make: Maker) -> None:
    with kept_remarks() as remarks:
        made = make(folder)
    splits = {split: {"account": vars(account), "hashes": dict(hashes)} for split, (account, hashes) in made.items()}
    with sealed_file(folder / _RECORD) as file:
        file.write(json.dumps({"key": key, "splits": splits, "remarks": remarks}, indent=2).encode())


def _clear(folder: Path) -> None:
    """Remove all that a store, or its killed maker, has left in a folder, except its lock. The record first."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != _RECORD):
        if path.name != LOCK_NAME:
            path.unlink()


def _remove_unused(cache: Path) -> None:
    """Remove the stores that nothing has used for a while, and what killed processes have left."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):  # another process removes it too
            record = folder / _RECORD
            used = (record if record.exists() else folder).stat().st_mtime
            if time.time() - used > _KEPT_DAYS * 86_400 and not is_locked(folder):
                shutil.rmtree(folder)


class Spool:
    """Rows in an Arrow file, in the order in which they were encoded, to be read in another order with little memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema

    def write(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Write all rows.

        Raises:
            InputError: the disk is full.
        """
        with explained_os_errors(self.path), pa.ipc.new_file(str(self.path), self.schema) as writer:
            for batch in joined_batches(batches, self.schema):
                writer.write_batch(batch)

    def in_order(self, order: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Yield the rows with these numbers, in this order, in batches."""
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            yield from rows_in_order([reader.get_batch(number) for number in range(reader.num_record_batches)], order)


def write_split(folder: Path, split: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the Arrow file of a split, in the stream format that ``datasets`` maps.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    with sealed_file(split_path(folder, split)) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
