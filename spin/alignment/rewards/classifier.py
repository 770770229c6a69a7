"""A sequence classifier with one output: token ids in, one logit out, each distinct input computed once."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.models.folder import read_config_file
from spin.alignment.models.vocabulary import check_ids
from spin.alignment.rewards.base import ScorerSettings
from spin.alignment.rewards.cache import ScoreCache, content_key
from spin.alignment.rewards.pairrm_checkpoint import is_pairrm

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_NO_LIMIT = 10**9  # tokenizers use a number near 1e30 for "no limit"


@dataclass(frozen=True)
class Encoded:
    """One input of a classifier.

    Attributes:
        ids: token ids, including special tokens.
        types: token type ids, for models that use them to distinguish the two texts of a pair.
        where: names the input in errors ("prompt p1, sample 2"); not part of its content.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    where: str

    @property
    def key(self) -> str:
        return content_key(self.ids, self.types)


def check_classifier_folder(folder: Path, kind: str) -> dict[str, Any]:
    """Return the configuration of a classifier with one output, without loading the model.

    Raises:
        InputError: the model is of another kind, or has another number of outputs.
    """
    config: dict[str, Any] = read_config_file(folder)
    architectures = config.get("architectures") or []
    if is_pairrm(config):
        raise InputError(f"{folder} is PairRM, which compares two responses: set scorer: preference_model")
    known = any("SequenceClassification" in name for name in architectures)
    if not known and "AutoModelForSequenceClassification" not in (config.get("auto_map") or {}):
        found = ", ".join(architectures) or "a model without a named architecture"
        raise InputError(
            f"{folder} is {found}, not a sequence classifier: give a {kind} saved as AutoModelForSequenceClassification"
        )
    # transformers assumes two labels if the configuration names none.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise InputError(
            f"{folder} has {labels} outputs (num_labels), but a {kind} has one: give a model with num_labels 1"
        )
    return config


class SequenceClassifier:
    """A model and its cached scores. The weights are loaded at the first uncached input, so a rerun does not load them."""

    def __init__(self, settings: ScorerSettings) -> None:
        """Check the model and load its tokenizer.

        Raises:
            InputError: the wrong kind of model, no tokenizer, or a max_length beyond the model's context.
        """
        from spin.alignment.core.provenance import hash_weights
        from spin.alignment.models.folder import model_folder
        from spin.alignment.models.precision import resolve_dtype

        assert settings.model is not None
        self.settings = settings
        self.folder = model_folder(settings.model)
        self.config = self._check()
        self.dtype = resolve_dtype(settings.dtype)
        self.tokenizer = self._make_tokenizer()
        self.limit = self._limit()
        self.cut = 0
        # Hashing reads all weights, so only if the cache needs it.
        weights = hash_weights(self.folder) if settings.cache_dir else ""
        self.cache = ScoreCache(settings.cache_dir, settings.name, weights, settings.dtype)
        self._model: Any = None

    def _check(self) -> dict[str, Any]:
        """Return the content of config.json after checking that the folder contains a classifier."""
        from spin.alignment.models.weights_check import check_model

        config = check_classifier_folder(self.folder, self.settings.name.replace("_", " "))
        check_model(self.folder, "classifier", self.settings.trust_remote_code)
        return config

    def _make_tokenizer(self) -> Any:
        from spin.alignment.data.chat_encoder import load_tokenizer

        return load_tokenizer(self.folder, trust_remote_code=self.settings.trust_remote_code)

    def _limit(self) -> int:
        """Return the longest input in tokens; raise :class:`InputError` if max_length exceeds the model's context."""
        config = self.config.get("text_config", self.config)
        positions = config.get("max_position_embeddings") or config.get("n_positions") or _NO_LIMIT
        if config.get("relative_attention") and not config.get("position_biased_input", True):
            positions = _NO_LIMIT  # DeBERTa-v2 without absolute positions has no longest input
        context = min(positions, self.tokenizer.model_max_length or _NO_LIMIT)
        wanted = self.settings.max_length
        if wanted is not None and wanted > context:
            raise InputError(
                f"scorer_max_length is {wanted}, but {self.folder} reads at most {context} tokens: lower it"
            )
        return context if wanted is None else wanted

    def excess(self, length: int, removable: int, where: str) -> int:
        """Return how many prompt tokens to remove from an input of ``length`` tokens, and count the truncation.

        Args:
            removable: number of prompt tokens that may be removed.

        Raises:
            InputError: the input is too long and max_length is not set, or it is too long even with an empty prompt.
        """
        excess = length - self.limit
        if excess <= 0:
            return 0
        if self.settings.max_length is None:
            raise InputError(
                f"{where} has {length} tokens, but {self.folder} reads at most {self.limit}: set scorer_max_length "
                "to cut the start of long prompts"
            )
        if excess > removable:
            raise InputError(
                f"{where} has {length - removable} tokens without its prompt, more than scorer_max_length {self.limit}: raise "
                "scorer_max_length, or generate shorter responses"
            )
        self.cut += 1
        return excess

    def report_truncated(self) -> None:
        """Log how many prompts were truncated since the last report."""
        if self.cut:
            logger.warning(
                "%s: %d inputs were longer than scorer_max_length %d and had the start of their prompt truncated",
                *(self.settings.name, self.cut, self.limit),
            )
            self.cut = 0

    def logits(self, inputs: Sequence[Encoded]) -> list[float]:
        """Return one logit per input, in order; computed in the model's precision, returned in float64.

        Raises:
            InputError: a logit is not finite; the error names the input.
        """
        found: dict[str, float] = {}
        new: dict[str, Encoded] = {}
        keys = [item.key for item in inputs]
        for key, item in zip(keys, inputs, strict=True):
            check_ids(item.ids, self.config, str(self.folder), item.where)
            if key in self.cache:
                found[key] = self.cache[key]
            else:
                new[key] = item
        # Sorted by length there is little padding, and with the longest first an out-of-memory error comes early.
        order = sorted(new.items(), key=lambda entry: -len(entry[1].ids))
        for start in range(0, len(order), self.settings.batch_size):
            batch = order[start : start + self.settings.batch_size]
            values = self._forward([item for _, item in batch])
            for (_, item), value in zip(batch, values, strict=True):
                if not math.isfinite(value):
                    raise InputError(
                        f"{self.folder} returned {value} for {item.where}: use another scorer_dtype or model"
                    )
            scored = {key: value for (key, _), value in zip(batch, values, strict=True)}
            self.cache.add(scored)
            found.update(scored)
        return [found[key] for key in keys]

    def _forward(self, batch: Sequence[Encoded]) -> list[float]:
        import torch

        model = self._loaded()
        # Decoder classifiers find the last token by the pad id. If the model has none, use an id that no input contains.
        config = model.config.get_text_config()
        named = config.pad_token_id
        config.pad_token_id = pad = _unused_id(batch) if named is None else named
        tensors = pad_batch(batch, pad)
        device = next(model.parameters()).device
        try:
            with torch.inference_mode():
                logits = model(**{name: value.to(device) for name, value in tensors.items()}).logits
        finally:
            config.pad_token_id = named
        values: list[float] = logits.double().reshape(len(batch)).tolist()
        return values

    def _loaded(self) -> Any:
        if self._model is None:
            import torch

            self._model = self._load().to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return self._model

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        from spin.alignment.models.library_output import without_progress_bars
        from spin.alignment.models.weights_check import refuse_mismatch

        with without_progress_bars():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                dtype=self.dtype,
                use_safetensors=True,
                trust_remote_code=self.settings.trust_remote_code,
                output_loading_info=True,
            )
        refuse_mismatch(self.folder, report, model.base_model_prefix, "classifier")
        model.config.get_text_config().use_cache = False  # no generation, so keys and values would waste memory
        return model

    def close(self) -> None:
        """Free the memory of the weights. May be called twice; a later input reloads them."""
        self.cache.close()
        if self._model is not None:
            import torch

            self._model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _unused_id(batch: Sequence[Encoded]) -> int:
    used = {token for item in batch for token in item.ids}
    return next(token for token in range(len(used) + 1) if token not in used)


def pad_batch(batch: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and, if all inputs have them, ``token_type_ids``; (B, T), padded on the right."""
    import torch

    longest = max(len(item.ids) for item in batch)

    def stack(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    tensors = {
        "input_ids": stack([item.ids for item in batch], pad),
        "attention_mask": stack([[1] * len(item.ids) for item in batch], 0),
    }
    if all(item.types is not None for item in batch):
        tensors["token_type_ids"] = stack([item.types or () for item in batch], 0)
    return tensors
