"""Content hashes of stored files: whether a disk, a copy or a network has changed them since they were written.

A *sealed* file ``NAME`` has its hash in a hidden file ``.NAME.xxh3`` next to it, which is written first. A file without a seal
(of an earlier version) is taken as it is. The hash is XXH3 (128 bits): several GB/s, so reading the file is what takes time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file, read_json, remove_files, write_json_atomic, write_text_atomic

_CHUNK = 2**22
HASHES_FILE = "hashes.json"
_WRITING = '"the files are still being written"\n'


def content_hash(path: Path) -> str:
    """Return the hash of a file's content, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal_path(path: Path) -> Path:
    """Return the file that contains the hash of a sealed file."""
    return path.with_name(f".{path.name}.xxh3")


@contextmanager
def sealed_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that appears under ``path``, sealed, once it is complete (see :func:`atomic_file`).

    Raises:
        InputError: the folder is not writable, or the disk is full; ``path`` is then unchanged.
    """
    path = Path(path)

    def seal(written: Path) -> None:
        with atomic_file(seal_path(path), sync_folder=False) as file:  # the sealed file's own rename follows
            file.write(content_hash(written).encode())

    with atomic_file(path, before_rename=seal) as file:
        yield file


def is_damaged(path: Path) -> bool:
    """Return whether a sealed file is not what was written; False for a file without a seal."""
    try:
        expected = seal_path(path).read_bytes()
    except FileNotFoundError:
        return False
    return expected != content_hash(path).encode()


def remove_sealed(paths: Iterable[Path]) -> None:
    """Remove files and their seals, ignoring those that do not exist."""
    for path in list(paths):  # ``paths`` may be a glob that is still reading the folder
        remove_files([path, seal_path(path)])


def begin_hashes(folder: Path) -> None:
    """Mark a folder, which is created if needed, as being written, until :func:`write_hashes`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / HASHES_FILE, _WRITING)


def lacks_hashes(folder: Path) -> bool:
    """Return whether a folder was being written when its process ended (see :func:`begin_hashes`)."""
    path = folder / HASHES_FILE
    return path.exists() and path.read_bytes() == _WRITING.encode()


def write_hashes(folder: Path) -> None:
    """Write the hashes of all files in a folder and its subfolders to ``hashes.json`` there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES_FILE)
    # The hash releases the GIL, and files are read in parallel.
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = dict(
            zip((str(path.relative_to(folder)) for path in files), pool.map(content_hash, files), strict=True)
        )
    write_json_atomic(folder / HASHES_FILE, hashes)


def damaged_file(folder: Path) -> str | None:
    """Return which file of a folder is missing or differs from its hash in ``hashes.json``; None if all are whole.

    A folder without that file is taken as it is.
    """
    path = folder / HASHES_FILE
    if not path.exists():
        return None
    try:
        hashes = read_json(path)
    except InputError:
        return HASHES_FILE
    if not isinstance(hashes, Mapping):
        return HASHES_FILE

    def differs(name: str) -> bool:
        file = folder / name
        return not file.is_file() or content_hash(file) != hashes[name]

    with ThreadPoolExecutor(max_workers=4) as pool:
        return next((name for name, wrong in zip(hashes, pool.map(differs, hashes), strict=True) if wrong), None)
