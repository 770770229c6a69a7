"""The sources of stages: models, data sets, pairs, and the scorers of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.resolve import module_files
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.models.folder import model_files
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline.stages.base import Source


def model_source(model: str) -> Source:
    return Source(model, lambda: model_files(model))


def data_source(path: str, split: str) -> Source:
    from spin.alignment.data.source_files import split_files
    from spin.alignment.data.source_names import is_local

    return Source(f"{path} {split}", lambda: split_files(path, split) if is_local(path) else [])


def pair_sources(folders: Sequence[str]) -> list[Source]:
    return [
        Source(path, lambda path=path: sorted(Path(path).glob("*_prefs-*.parquet")))  # type: ignore[misc]
        for path in folders
    ]


def scorer_sources(section: Mapping[str, Any]) -> list[Source]:
    """What the scores of a section depend on besides its settings: the scoring model, or the modules of its own rules."""
    from spin.alignment.pairs.annotate import rule_files

    name, model = str(section.get("scorer") or ""), section.get("scorer_model")
    sources = [model_source(str(model))] if model and name != "judge" else []
    return sources + ([Source(f"scorer {name}", lambda: list(rule_files(name).values()))] if ":" in name else [])


# The keys that may name a user's function as module:function.
METHOD_KEYS = ("pairing", "weighting", "loss_type")


def function_sources(section: Mapping[str, Any]) -> list[Source]:
    """The files of the user's own pairing, weighting and loss in a section, which the checks have already imported."""
    names = {key: str(section.get(key) or "") for key in METHOD_KEYS}
    return [
        Source(f"{key} {name}", lambda name=name: list(module_files(name).values()))  # type: ignore[misc]
        for key, name in names.items()
        if ":" in name
    ]


def needs_ground_truth(section: Mapping[str, Any], default_pairing: str) -> bool:
    """Return whether the pairing or the scorer of a section compares responses with the ground truth."""
    from spin.alignment.methods.pairings import find_pairing

    pairing = find_pairing(section.get("pairing", default_pairing))
    return pairing.needs_ground_truth or needs_ground_truth_to_score(section)


def needs_ground_truth_to_score(section: Mapping[str, Any]) -> bool:
    """Return whether the scorer of a section, if it has one, compares responses with the ground truth."""
    from spin.alignment.rewards import needs_reference

    scorer = section.get("scorer")
    return scorer is not None and needs_reference(scorer)


def engine_gpus(config: GenerateConfig | EvaluateConfig) -> int:
    """Return the GPUs of a process that generates: those of its engine, none if a server generates."""
    from spin.alignment.generation import find_backend

    return 0 if find_backend(config.backend).needs_server else config.tensor_parallel_size


def scorer_gpus(config: ConvertConfig | SelectConfig) -> int:
    """Return the GPUs of a process that scores: one for a model of its own, none for a rule or a server."""
    from spin.alignment.rewards import GROUP_SCORERS

    return int(config.scorer in GROUP_SCORERS and config.base_url is None)
