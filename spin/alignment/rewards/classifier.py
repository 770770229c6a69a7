"""A sequence classifier with one output: token ids in, one logit out, each distinct input computed once."""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
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
    return check_classifier_config(read_config_file(folder), folder, kind)


def check_classifier_config(config: dict[str, Any], folder: Path, kind: str) -> dict[str, Any]:
    """Return the content of a config.json; raise :class:`InputError` as :func:`check_classifier_folder`."""
    architectures = config.get("architectures") or []
    if is_pairrm(config):
        raise InputError(
            f"{folder} is PairRM, which compares two responses and which no server computes: set scorer: preference_model, "
            "without base_url"
        )
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
        from spin.alignment.models.folder import model_folder
        from spin.alignment.models.precision import resolve_dtype

        assert settings.model is not None
        self.settings = settings
        self.folder = model_folder(settings.model, needs_weights=settings.base_url is None)
        self.config = self._check()
        self.dtype = resolve_dtype(settings.dtype)
        self.tokenizer = self._make_tokenizer()
        self.limit = self._limit()
        self.cut = 0
        self.cache = ScoreCache(settings.cache_dir, settings.name, *self._identity())
        self._models: list[Any] = []  # one on each device

    def _identity(self) -> tuple[object, ...]:
        """Return what decides the scores of an input, for the cache."""
        from spin.alignment.core.provenance import hash_weights

        # Hashing reads all weights, so only if the cache needs it.
        return (hash_weights(self.folder) if self.settings.cache_dir else "", self.settings.dtype)

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
        size = self.settings.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        results = self._values([[item for _, item in batch] for batch in batches])
        with closing(results):
            for batch, values in zip(batches, results, strict=True):
                self._check_finite(batch, values)
                scored = {key: value for (key, _), value in zip(batch, values, strict=True)}
                self.cache.add(scored)
                found.update(scored)
        return [found[key] for key in keys]

    def _check_finite(self, batch: Sequence[tuple[str, Encoded]], values: Sequence[float]) -> None:
        for (_, item), value in zip(batch, values, strict=True):
            if not math.isfinite(value):
                raise InputError(f"{self.folder} returned {value} for {item.where}: use another scorer_dtype or model")

    def _values(self, batches: Sequence[Sequence[Encoded]]) -> Generator[list[float]]:
        """Yield the logits of each batch, in order. With several devices, each computes the next batch that is waiting."""
        models = self._loaded(len(batches)) if batches else []
        if len(models) <= 1:
            for batch in batches:
                yield self._forward(batch, models[0])
            return
        idle: SimpleQueue[Any] = SimpleQueue()
        for model in models:
            idle.put(model)

        def forward(batch: Sequence[Encoded]) -> list[float]:
            model = idle.get()
            try:
                return self._forward(batch, model)
            finally:
                idle.put(model)

        with ThreadPoolExecutor(len(models), thread_name_prefix="scorer") as threads:
            results = [threads.submit(forward, batch) for batch in batches]
            try:
                for result in results:
                    yield result.result()
            finally:
                for result in results:
                    result.cancel()

    def _forward(self, batch: Sequence[Encoded], model: Any) -> list[float]:
        import torch

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

    def _loaded(self, wanted: int) -> list[Any]:
        """Return the model on as many devices as there are, but at most ``wanted``; those that are missing are loaded."""
        devices = scoring_devices(self.settings.all_devices)[:wanted]
        if len(self._models) < len(devices):
            loaded = self._load().eval()
            # A copy for every device but the last, which takes the weights that were read.
            *others, last = devices[len(self._models) :]
            self._models += [copy.deepcopy(loaded).to(device) for device in others] + [loaded.to(last)]
        return self._models[: len(devices)]

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
        if self._models:
            import torch

            self._models = []
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def scoring_devices(every: bool) -> list[str]:
    """Return the devices that score in this process: its own GPU, or ``every`` visible one; the CPU if there is none.

    Each of several processes (a training) has a GPU of its own, and uses no other.
    """
    import torch

    if not torch.cuda.is_available():
        return ["cpu"]
    if not every or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ["cuda"]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


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
