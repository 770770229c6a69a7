"""Checks of a model folder that need no weights to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.core.hub import hub_reason
from spin.alignment.core.provenance import SUMS_FILE, read_sums
from spin.alignment.core.upload import Upload, make_upload
from spin.alignment.models.positions import fixed_positions
from spin.alignment.models.vocabulary import check_ids


def check_model_path(name: str, needs_weights: bool = True) -> None:
    """Check a model folder before the model is loaded; Hub names are checked when they are resolved.

    Raises:
        InputError: no name, a missing folder, no config, no weights, only pickled weights, or links without their files.
    """
    if not name:
        raise InputError("model_name_or_path is missing: name a model folder or a Hub model")
    folder = Path(name)
    if not folder.is_dir():
        # A Hub name has the form name or owner/name; anything else is meant as a path.
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"model folder {name} does not exist: check the path")
        return
    links = (path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.exists())
    broken = [path.name for path in links if any(fnmatch(path.name, pattern) for pattern in MODEL_PATTERNS)]
    if broken:
        raise InputError(
            f"{broken[0]} in {name} is a link to a file that does not exist: copy the folder again with the files that its links "
            "name (cp -rL)"
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{name} contains an adapter and no model: give the folder of the model, and the adapter with --adapter (or "
                "merge them)"
            )
        raise InputError(f"{name} contains no config.json: give the folder of a saved model")
    read_config_file(folder)
    if needs_weights and not any(folder.glob("*.safetensors")):
        found = "only pickled weights" if any(folder.glob("*.bin")) else "no weights"
        raise InputError(f"{name} contains {found}: save the model as safetensors (save_pretrained) first")


def read_config_file(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        InputError: it is not a JSON object that names a model type.
    """
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or not (values.get("model_type") or values.get("auto_map")):
        raise InputError(f"{path} does not name a model_type: restore the file that the model was saved with")
    return values


def model_folder(name: str, revision: str | None = None, needs_weights: bool = True) -> Path:
    """Return the local folder of a model: the folder itself, or the Hub snapshot of a revision (downloaded unless offline).

    Without ``needs_weights``, only the other files are downloaded.

    Raises:
        InputError: the Hub model is neither cached nor reachable.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    # The README says under which licence the model is.
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", *(["*.safetensors"] if needs_weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"model '{name}' is neither a local folder nor a Hub model that can be read ({hub_reason(error)}): check the name, "
            "give a folder, or unset HF_HUB_OFFLINE to download the model"
        ) from error


def check_fits(folder: Path, longest: int, max_token_id: int) -> None:
    """Check sequences against a model's configuration before its weights are loaded.

    Raises:
        InputError: sequences exceed the model's context or the length up to which its positions are fixed, or contain ids
            outside its vocabulary.
    """
    check_config_fits(read_config_file(folder), str(folder), longest, max_token_id)


def check_config_fits(config: Mapping[str, Any], name: str, longest: int, max_token_id: int) -> None:
    """Check sequences against the content of a model's ``config.json``; ``name`` is the model's in messages.

    Raises:
        InputError: as :func:`check_fits`.
    """
    context = context_length(config)
    if context is not None and longest > context:
        raise InputError(
            f"the longest row has {longest} tokens, but {name} can attend to {context} tokens: lower max_length"
        )
    fixed = fixed_positions(_text_settings(config))
    if fixed and longest > fixed:
        raise InputError(
            f"the longest sequence has {longest} tokens, but above {fixed} tokens the positions of {name} depend on the longest "
            f"sequence of a batch, and so would every log-prob: lower max_length to {fixed}"
        )
    check_ids([max_token_id], config, name, "the data")


def is_complete_checkpoint(path: str | Path) -> bool:
    """Return whether a folder contains a model that :func:`save_checkpoint` finished writing."""
    folder = Path(path)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def context_length(config: Any) -> int | None:
    """Return the number of tokens a model can attend to, from its configuration (an object, or config.json's content); None if
    there is no limit.
    """
    settings = _text_settings(config if isinstance(config, Mapping) else config.to_dict())
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = settings.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model, which multimodal models have in a section of its own."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


# The files of a saved model. A checkpoint folder also contains logs and trainer state, which do not affect later stages.
MODEL_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)


def model_files(folder: str | Path) -> list[Path]:
    """Return the files of a saved model, sorted by path."""
    return sorted({path for pattern in MODEL_PATTERNS for path in Path(folder).glob(pattern) if path.is_file()})


def published_model(folder: Path) -> Upload:
    """Return what is uploaded of a model folder: the model, its card and metrics, but nothing that is only needed to resume.

    Raises:
        InputError: the folder contains no complete model.
    """
    if not is_complete_checkpoint(folder):
        raise InputError(f"{folder} contains no complete model: finish its training first")
    # With code of its own, a model was saved with files that model_files() does not know.
    names = ("metrics.json", SUMS_FILE, *read_sums(folder))
    return make_upload(folder, [*model_files(folder), *(folder / name for name in names)], "model")
