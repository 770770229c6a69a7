"""PairRM's checkpoint as its authors publish it: a DeBERTa-v3 encoder and a head over its marks (arXiv 2306.02561).

Two forms are in use, with the same weights: ``llm-blender/PairRM``, whose config.json has the settings of LLM-Blender's ranker
and not those of the encoder, and ``llm-blender/PairRM-hf``, whose config.json is the encoder's with the ids of the marks added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.models.folder import read_config_file
from spin.alignment.models.weights_check import WEIGHTS_FILE, read_header, refuse_mismatch

if TYPE_CHECKING:
    import torch

# In the order in which the authors added them to DeBERTa's tokenizer; the last was only used in their training.
MARKS = SOURCE, FIRST, SECOND, _CANDIDATE = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"
_MARK_KEYS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
# Longest source and candidate in tokens, with their class and separator token; PairRM-hf names them only in its model card.
_SOURCE_LENGTH, _CANDIDATE_LENGTH = 1224, 412
_EMBEDDINGS = "pretrained_model.embeddings.word_embeddings.weight"
_HEAD_WIDTH = 64  # of an attention head, in every DeBERTa-v3
# What all DeBERTa-v3 encoders have in common; their sizes are those of the weights.
_DEBERTA_V3 = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-7,
    "max_position_embeddings": 512,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pad_token_id": 0,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
}


@dataclass(frozen=True)
class PairRMCheckpoint:
    """A checked checkpoint.

    Attributes:
        encoder: the encoder's ``DebertaV2Config``.
        tasks: outputs of the head; their mean is the logit.
        source_length: longest source in tokens, including its class and separator token.
        candidate_length: longest candidate if the source is that long; a shorter source leaves each half of the difference.
        mark_ids: ids that config.json gives the marks, in the order of :data:`MARKS`; None if it does not.
    """

    folder: Path
    encoder: Any
    tasks: int
    source_length: int
    candidate_length: int
    mark_ids: tuple[int, ...] | None


def is_pairrm(config: Mapping[str, Any]) -> bool:
    """Return whether the content of a config.json is that of PairRM, in either form."""
    return config.get("ranker_type") == "pairranker" or "DebertaV2PairRM" in (config.get("architectures") or [])


def check_pairrm(folder: Path) -> PairRMCheckpoint:
    """Check config.json and the names and shapes of all weights, from the header of their file alone.

    Raises:
        InputError: weights are missing, unexpected or of another shape, or the encoder is no DeBERTa-v3.
    """
    import torch

    from spin.alignment.rewards.pairrm_module import PairRMModule

    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} has no {WEIGHTS_FILE}: copy the folder again (pickled weights are not loaded)")
    values, stored = read_config_file(folder), read_header(folder / WEIGHTS_FILE)
    published = "ranker_type" in values
    encoder = _published_encoder(folder, values, stored) if published else _encoder(folder, values)
    marks = None if published else tuple(_number(folder, values, key) for key in _MARK_KEYS)
    checkpoint = PairRMCheckpoint(
        folder,
        encoder,
        _number(folder, values, "n_tasks", 1),
        _number(folder, values, "source_maxlength", _SOURCE_LENGTH),
        _number(folder, values, "candidate_maxlength", _CANDIDATE_LENGTH),
        marks,
    )
    try:
        with torch.device("meta"):
            described = PairRMModule(encoder, checkpoint.tasks, (0, 0, 0)).state_dict()
    except Exception as error:  # sizes that do not fit together fail anywhere
        raise InputError(
            f"{folder / 'config.json'} describes an encoder that cannot be built ({reason_of(error)}): copy the folder again"
        ) from error
    refuse_mismatch(folder, _report(described, stored))
    return checkpoint


def load_pairrm(checkpoint: PairRMCheckpoint, mark_ids: tuple[int, int, int], dtype: torch.dtype | str) -> Any:
    """Return the :class:`PairRMModule` of a checkpoint on the CPU.

    Args:
        mark_ids: ids of the source mark and the two candidate marks.
        dtype: precision of its weights; "auto" is that of the file.
    """
    import torch
    from safetensors.torch import load_file

    from spin.alignment.rewards.pairrm_module import PairRMModule

    stored = load_file(checkpoint.folder / WEIGHTS_FILE)
    model = PairRMModule(checkpoint.encoder, checkpoint.tasks, mark_ids)
    known = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in stored.items() if name in known})
    return model.to(dtype if isinstance(dtype, torch.dtype) else stored[_EMBEDDINGS].dtype)


def _encoder(folder: Path, values: Mapping[str, Any]) -> Any:
    from transformers import DebertaV2Config

    try:
        return DebertaV2Config.from_dict(dict(values))
    except Exception as error:  # the library's checks of a configuration raise their own kinds
        raise InputError(
            f"{folder / 'config.json'} describes no DeBERTa encoder ({reason_of(error)}): copy the folder again"
        ) from error


def _published_encoder(folder: Path, values: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> Any:
    """Return the configuration of the encoder that the ranker's config.json only names: DeBERTa-v3 of the size of the weights.

    Raises:
        InputError: another encoder is named, or a weight that gives a size is missing.
    """
    from transformers import DebertaV2Config

    name = str(values.get("model_name"))
    if not name.rstrip("/").rpartition("/")[2].startswith("deberta-v3-"):
        raise InputError(f"{folder} is a pair ranker over {name}, but only those over DeBERTa-v3 can be loaded")
    prefix = "pretrained_model.encoder"
    needed = (_EMBEDDINGS, f"{prefix}.layer.0.intermediate.dense.weight", f"{prefix}.rel_embeddings.weight")
    refuse_mismatch(folder, _report(dict.fromkeys(needed), {name: None for name in needed if name in stored}))
    (vocabulary, width), (inner, _), (positions, _) = (tuple(stored[name].shape) for name in needed)
    layers = {key.split(".")[3] for key in stored if key.startswith(f"{prefix}.layer.")}
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "position_buckets": positions // 2,
    }
    return DebertaV2Config(**_DEBERTA_V3, **sizes)


def _report(described: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the differences of two sets of weights in the form of transformers' reports."""
    return {
        "missing_keys": described.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - described.keys(),
        "mismatched_keys": [
            (name, stored[name].shape, described[name].shape)
            for name in described.keys() & stored.keys()
            if getattr(described[name], "shape", None) != getattr(stored[name], "shape", None)
        ],
    }


def _number(folder: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number above 0 of a config.json.

    Raises:
        InputError: it is missing and has no default, or is something else.
    """
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} in {folder / 'config.json'} is {value!r}, not a number above 0: copy the folder again")
    return value


__all__ = ["FIRST", "MARKS", "SECOND", "SOURCE", "PairRMCheckpoint", "check_pairrm", "is_pairrm", "load_pairrm"]
