"""Scores generated responses before they are paired: the scorer that the pairing needs, and its labels on the rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.resolve import module_files
from spin.alignment.core.settings import changed_of, part_of
from spin.alignment.methods.pairings import PAIRINGS, find_pairing, label_rows, writers

if TYPE_CHECKING:
    from spin.alignment.pairs.config import ConvertConfig
    from spin.alignment.rewards import GroupScorer, ScorerSettings


@dataclass(frozen=True)
class Labeller:
    """Adds a scorer's labels to generated rows, all prompts of a record batch at a time."""

    scorer: GroupScorer

    def label(self, prompts: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Label the rows of some prompts in place (:func:`spin.alignment.methods.pairings.label_rows`).

        Raises:
            InputError: the scorer cannot score a response, or its labels contradict each other; the prompt is named.
        """
        from spin.alignment.data.rows import scorer_columns
        from spin.alignment.data.turns import answer_text
        from spin.alignment.rewards import PromptGroup

        ordered = [sorted(rows, key=lambda row: int(row["sample_index"])) for rows in prompts]
        groups = [
            PromptGroup(
                prompt_id=rows[0]["prompt_id"],
                prompt=rows[0]["rejected"][:-1],
                responses=[answer_text(row["rejected"][-1]) for row in rows],
                reference=None if rows[0]["chosen"] is None else answer_text(rows[0]["chosen"][-1]),
                tools=rows[0].get("tools"),
                columns=scorer_columns(rows[0]),
            )
            for rows in ordered
        ]
        for rows, labels in zip(ordered, self.scorer.label(groups), strict=True):
            label_rows(rows, labels.scores, labels.win_probs, labels.reference_score)


def count_failures(rows: Sequence[dict[str, Any]], reads_ground_truth: bool) -> int:
    """Return how many responses to one prompt the scorer failed on, including the ground truth if it is scored."""
    failed = sum(row["rejected_score"] is None for row in rows)
    return failed + (reads_ground_truth and rows[0]["chosen_score"] is None)


def scorer_settings(config: ConvertConfig) -> ScorerSettings | None:
    """Return the checked scorer of a conversion; None if the pairing reads no scores.

    Raises:
        InputError: the pairing needs a scorer and none is named, or the reverse; or the scorer's settings are invalid.
    """
    from spin.alignment.rewards import GROUP_SCORERS, SCORERS, ScorerSettings, check_scorer

    pairing = find_pairing(config.pairing)
    if not pairing.needs:
        given = changed_of(config, ScorerSettings)
        if given:
            readers = ", ".join(sorted(name for name in PAIRINGS if find_pairing(name).needs))
            raise InputError(
                f"{given[0]} is {getattr(config, given[0])}, but pairing {config.pairing} reads no scores: remove it, or "
                f"choose one of {readers}"
            )
        return None
    if not config.scorer:
        names = ", ".join(sorted([*SCORERS, *GROUP_SCORERS]))
        raise InputError(
            f"pairing {config.pairing} compares scores: pass --scorer with one of {names}, or module:function"
        )
    settings = part_of(config, ScorerSettings, score_reference=pairing.reads_ground_truth, all_devices=True)
    check_scorer(settings)
    return settings


def check_loss(pairing_name: str, loss_type: str) -> None:
    """Check that a pairing writes what a loss reads.

    Raises:
        InputError: it does not, or the loss compares two responses and the pairing prefers neither.
    """
    from spin.alignment.methods.losses import LOSSES, find_loss

    pairing, loss = find_pairing(pairing_name), find_loss(loss_type)
    for label in loss.labels:
        if not pairing.writes(label):
            names = ", ".join(writers(label))
            fix = f"set pairing: {names}" if names else f"name it among the labels of your own pairing ({label.name})"
            raise InputError(
                f"loss_type {loss_type} reads {label.name}s, which pairing {pairing_name} does not write: {fix}"
            )
    if loss.compares and not pairing.prefers:
        others = ", ".join(name for name in LOSSES if not find_loss(name).compares)
        raise InputError(
            f"pairing {pairing_name} prefers neither response, but loss_type {loss_type} compares two: set loss_type: {others}"
        )


def scorer_record(settings: ScorerSettings) -> dict[str, Any]:
    """Return what determines a scorer's labels: its name and settings, and hashes of its weights or its own module."""
    from spin.alignment.core.provenance import hash_file

    record: dict[str, Any] = {"scorer": settings.name, "scorer_model": settings.model}
    record |= {"scorer_max_length": settings.max_length, "scorer_dtype": settings.dtype}
    if settings.name in ("reward_model", "preference_model") and settings.model:
        if settings.base_url is None:  # a server chooses the weights that it loads
            record["scorer_weights"] = _weights_hash(settings.model)
        record["scorer_tokenizer"] = _tokenizer_hash(settings.model, settings.base_url is None)
    if settings.name == "judge" and settings.model is None:  # the judge is whatever model that server has loaded
        record["base_url"] = settings.base_url
    record |= {f"scorer_module_{name}": hash_file(path) for name, path in rule_files(settings.name).items()}
    return {name: value for name, value in record.items() if value is not None}


def rule_files(scorer: str) -> dict[str, Path]:
    """Return the files of a scorer's terms ``module:function`` by module, once :func:`scorer_settings` has imported them."""
    return module_files(*(term.rpartition("*")[2].strip() for term in scorer.split("+")))


@functools.cache
def _weights_hash(model: str) -> str:
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.models.folder import model_folder

    return hash_weights(model_folder(model))


@functools.cache
def _tokenizer_hash(model: str, needs_weights: bool) -> str:
    """Return a hash of the other files of a model: configuration, tokenizer, chat template."""
    from spin.alignment.core.provenance import hash_file, hash_text
    from spin.alignment.models.folder import model_files, model_folder

    files = [
        path for path in model_files(model_folder(model, needs_weights=needs_weights)) if "safetensors" not in path.name
    ]
    return hash_text(*(f"{path.name}={hash_file(path)}" for path in files))
