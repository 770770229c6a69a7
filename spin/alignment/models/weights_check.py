"""Checks that a folder contains the model that its config.json describes, from the headers of its weight files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import read_json
from spin.alignment.models.folder import read_config_file
from spin.alignment.models.library_output import quiet_library

if TYPE_CHECKING:
    import torch

Task = Literal["causal", "classifier"]
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Buffers that older versions of transformers saved, and that every version computes itself.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.bias|attn\.masked_bias)$")
_NAMED = 3


def check_model(
    folder: Path, task: Task = "causal", trust_remote_code: bool = False, needs_weights: bool = True
) -> Any:
    """Check config.json, generation_config.json and the names and shapes of all weights; return the model's configuration.

    Reads no weights, only the headers of their files. A quantised model has other names and shapes: its files are checked here,
    its weights when it is loaded.

    Raises:
        InputError: a file is damaged or describes no model of this kind, or weights are missing, unexpected or of another shape.
    """
    from transformers import AutoConfig

    values = read_config_file(folder)
    if needs_weights and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} contains a model and an adapter (adapter_config.json), and programs differ in which they load: move "
            "the adapter to a folder of its own"
        )
    try:
        with quiet_library():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's configuration raises its own kinds
        raise InputError(
            f"{folder / 'config.json'} describes no model that transformers can load ({reason_of(error)}): restore the file, "
            "or update transformers"
        ) from error
    _check_heads(folder, config.get_text_config())
    _check_generation_config(folder)
    stored = stored_weights(folder) if needs_weights else {}
    model = meta_model(folder, config, task, trust_remote_code)
    if stored and "quantization_config" not in values:
        _refuse_8bit(folder, stored)
    if model is not None and stored and "quantization_config" not in values:
        refuse_mismatch(folder, _compared(folder, type(model), config, stored), model.base_model_prefix, task)
    return config


def _refuse_8bit(folder: Path, stored: Mapping[str, torch.Tensor]) -> None:
    """Refuse matrices of 8 bits in a model that is not said to be quantised: without their scales they are other weights."""
    for name, weight in stored.items():
        if name.endswith(".weight") and weight.dim() == 2 and weight.element_size() == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError(
                f"the weight {name} in {folder} is {kind}, but its config.json has no quantization_config: restore the "
                "config.json that it was saved with, or use the model that is not quantised"
            )


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder as tensors without data, by name, read from the headers of its safetensors files.

    Raises:
        InputError: a file is missing or damaged, or the index names weights that its files do not contain.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "none"
            raise InputError(
                f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE} (safetensors found: {found}): copy the folder again, or "
                "save the model with save_pretrained"
            )
        return read_header(folder / WEIGHTS_FILE)
    record = read_json(index)
    places = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no weight_map: restore the file")
    stored: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise InputError(f"{index} names {name}, which is missing: copy the folder again")
        stored |= read_header(folder / name)
    absent = sorted(set(places) - set(stored))
    if absent:
        raise InputError(
            f"{index} names weights that its files do not contain ({_some(absent)}): copy the folder again"
        )
    return stored


def read_header(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file on the meta device, without reading their data.

    Raises:
        InputError: the file is empty, truncated or damaged.
    """
    import torch
    from safetensors import safe_open
    from transformers.modeling_utils import str_to_torch_dtype

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: torch.empty(
                    part.get_shape(), dtype=str_to_torch_dtype.get(part.get_dtype(), torch.uint8), device="meta"
                )
                for name, part in slices.items()
            }
    except Exception as error:  # SafetensorError, OSError, and what a damaged header makes of shapes and names
        raise InputError(f"{path} is damaged ({reason_of(error)}): copy it again, or save the model again") from error


def refuse_mismatch(
    folder: Path | str, found: Mapping[str, Any], prefix: str = "", task: Task = "causal", quantised: bool = False
) -> None:
    """Refuse weights that transformers would initialise at random, ignore or skip.

    Args:
        found: its report of a load, with ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.
        prefix: the name of the model below its head. A classifier may come with other heads, which it does not use.
        quantised: the files are quantised: they contain scales besides the weights.

    Raises:
        InputError: there are such weights; some of them are named.
    """
    missing = sorted(found["missing_keys"])
    unexpected = sorted(name for name in found["unexpected_keys"] if not _COMPUTED.search(name))
    if task == "classifier":
        unexpected = [name for name in unexpected if name.startswith(f"{prefix}.")]
    fix = "copy the folder again, or restore the config.json that it was saved with"
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} weights that its config.json describes ({_some(missing)}): {fix}"
        )
    if found["mismatched_keys"]:
        name, stored, described = min(found["mismatched_keys"])
        raise InputError(
            f"the weight {name} in {folder} has the shape {tuple(stored)}, but its config.json describes "
            f"{tuple(described)}: {fix}"
        )
    if unexpected and not quantised:
        raise InputError(
            f"{folder} contains {len(unexpected)} weights that its config.json does not describe ({_some(unexpected)}): {fix}"
        )


def _compared(folder: Path, model_class: Any, config: Any, stored: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return transformers' own report of loading the stored weights, on the meta device, where nothing is computed.

    Its loading code knows what a comparison of names does not: tied weights, renamed and fused ones.
    """
    with quiet_library():
        try:
            _, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=stored,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            raise InputError(
                f"the weights in {folder} do not fit its config.json ({reason_of(error)}): copy the folder again, or restore "
                "the config.json that it was saved with"
            ) from error
    return report


def meta_model(folder: Path, config: Any, task: Task, trust_remote_code: bool) -> Any:
    """Return the model that a configuration describes, on the meta device; None if only another library (vLLM) knows it.

    Raises:
        InputError: it cannot be built.
    """
    import torch
    import transformers

    autos = {
        "causal": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }
    auto = autos[task]
    remote = auto.__name__ in (getattr(config, "auto_map", None) or {})
    known = remote or type(config) in auto._model_mapping
    names = getattr(config, "architectures", None)
    other: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not known and other is None:
        return None
    try:
        with quiet_library(), torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code) if known else other(config)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'} describes a model that cannot be built ({reason_of(error)}): restore the file"
        ) from error


def _check_generation_config(folder: Path) -> None:
    """Check the file that transformers would ignore when it loads a model and refuse when it saves the trained one."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        with quiet_library():
            settings = GenerationConfig.from_pretrained(folder)
            validate_generation_config(settings)
    except Exception as error:  # its checks raise their own kinds, and wrong types fail anywhere
        raise InputError(
            f"{path} is not a valid generation configuration ({reason_of(error)}): restore or remove the file"
        ) from error
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if not isinstance(getattr(settings, name, None), int | float | None):
            raise InputError(f"{name} in {path} is {getattr(settings, name)!r}: it must be a number")
    ends = settings.eos_token_id
    if not all(isinstance(token, int) for token in (ends if isinstance(ends, list) else [ends] if ends else [])):
        raise InputError(f"{path} has the eos_token_id {ends!r}: it must be a token id or a list of them")


def validate_generation_config(settings: Any) -> None:
    """Set ``do_sample`` in a generation config that has sampling values but no sampling, which transformers refuses to save.

    Raises:
        ValueError: it is invalid for another reason.
    """
    try:
        settings.validate(strict=True)
    except ValueError:
        # Only if that was the fault: validated again, and any other error is raised here rather than after training.
        settings.do_sample = True
        settings.validate(strict=True)


def _check_heads(folder: Path, config: Any) -> None:
    """Check sizes that a model accepts when it is built and fails on in its first forward pass."""
    file = folder / "config.json"
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    width, vocabulary = getattr(config, "hidden_size", None), getattr(config, "vocab_size", None)
    reach = {name: getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")}
    sizes = {"num_attention_heads": heads, "hidden_size": width, "vocab_size": vocabulary, **reach}
    for name, value in sizes.items():
        if name == "sliding_window" and value == 0:  # some models write 0 for none
            continue
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} in {file} is {value!r}: it must be a number above 0")
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise InputError(
            f"{file} has {heads} attention heads but {groups} key-value heads, which does not divide them: restore the file"
        )
    size = getattr(config, "head_dim", None)
    if isinstance(heads, int) and isinstance(width, int) and size is None and width % heads:
        raise InputError(
            f"{file} has {heads} attention heads, which do not divide hidden_size {width}: restore the file"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


__all__ = ["Task", "check_model", "meta_model", "read_header", "refuse_mismatch", "stored_weights"]
