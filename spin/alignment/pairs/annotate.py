"""Scores of generated responses before they are paired: which scorer the pairing needs, and its labels on the rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.resolve import module_files
from spin.alignment.methods.pairings import PAIRINGS, find_pairing, label_rows, writers

if TYPE_CHECKING:
    from spin.alignment.rewards import GroupScorer, ScorerSettings

# Flags that say something about a scorer, with the value that says nothing.
SCORER_FLAGS: dict[str, Any] = {
    "scorer_model": None,
    "scorer_batch_size": 16,
    "scorer_max_length": None,
    "scorer_dtype": "auto",
    "base_url": None,
    "score_cache": None,
    "trust_remote_code": False,
}


@dataclass(frozen=True)
class Labeller:
    """Puts a scorer's labels on generated rows, all prompts of a record batch at a time."""

    scorer: GroupScorer

    def label(self, prompts: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Label the rows of some prompts in place (:func:`spin.alignment.methods.pairings.label_rows`).

        Raises:
            InputError: the scorer cannot score a response, or its labels contradict each other; the prompt is named.
        """
        from spin.alignment.rewards import PromptGroup

        ordered = [sorted(rows, key=lambda row: int(row["sample_index"])) for rows in prompts]
        groups = [
            PromptGroup(
                prompt_id=rows[0]["prompt_id"],
                prompt=rows[0]["rejected"][:-1],
                responses=[row["rejected"][-1]["content"] for row in rows],
                reference=None if rows[0]["chosen"] is None else rows[0]["chosen"][-1]["content"],
            )
            for rows in ordered
        ]
        for rows, labels in zip(ordered, self.scorer.label(groups), strict=True):
            label_rows(rows, labels.scores, labels.win_probs, labels.reference_score)


def count_failures(rows: Sequence[dict[str, Any]], reads_truth: bool) -> int:
    """Return on how many responses to one prompt, its ground truth included where that is read, the scorer failed."""
    failed = sum(row["rejected_score"] is None for row in rows)
    return failed + (reads_truth and rows[0]["chosen_score"] is None)


def add_scorer_flags(add: Any) -> None:
    """Add the flags of a scorer to a command line, by its ``add_argument``."""
    add(
        "--scorer", help="what scores the responses: a rule (math_answer, module:function) or a model (docs/scoring.md)"
    )
    add("--scorer_model", help="folder or Hub name of the reward or preference model; name of the judge")
    add("--scorer_batch_size", type=int, default=16, help="sequences in one forward pass, requests in flight (judge)")
    add(
        "--scorer_max_length",
        type=int,
        default=None,
        help="tokens of a sequence (default: the scoring model's context)",
    )
    add("--scorer_dtype", default="auto", help="precision of the scoring model: auto, float32, bfloat16, float16")
    add("--base_url", help="address of the judge's server")
    add("--score_cache", help="folder in which the scores of models are kept")
    add("--trust_remote_code", action="store_true", help="run code that comes with the scoring model")


def scorer_settings(options: Any) -> ScorerSettings | None:
    """Return the checked scorer of a command line; None where the pairing reads no scores.

    Raises:
        InputError: the pairing needs a scorer and none is named, or the reverse; or the scorer cannot work as it is set.
    """
    pairing = find_pairing(options.pairing)
    if not pairing.needs:
        given = [
            name for name, default in {"scorer": None, **SCORER_FLAGS}.items() if getattr(options, name) != default
        ]
        if given:
            readers = ", ".join(sorted(name for name in PAIRINGS if find_pairing(name).needs))
            raise InputError(
                f"{given[0]} is {getattr(options, given[0])}, but pairing {options.pairing} reads no scores: leave it out, or "
                f"choose one of {readers}"
            )
        return None
    from spin.alignment.rewards import GROUP_SCORERS, SCORERS, ScorerSettings, check_scorer

    if not options.scorer:
        names = ", ".join(sorted([*SCORERS, *GROUP_SCORERS]))
        raise InputError(
            f"pairing {options.pairing} compares scores: pass --scorer with one of {names}, or module:function"
        )
    settings = ScorerSettings(
        name=options.scorer,
        model=options.scorer_model,
        batch_size=options.scorer_batch_size,
        max_length=options.scorer_max_length,
        base_url=options.base_url,
        score_reference=pairing.reads_truth,
        cache_dir=options.score_cache,
        dtype=options.scorer_dtype,
        trust_remote_code=options.trust_remote_code,
    )
    check_scorer(settings)
    return settings


def check_loss(pairing_name: str, loss_type: str) -> None:
    """Check that a pairing writes what a loss reads.

    Raises:
        InputError: it does not, or the loss compares two responses of which the pairing prefers none.
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
            f"pairing {pairing_name} prefers no response, but loss_type {loss_type} compares two: set loss_type: {others}"
        )


def scorer_record(settings: ScorerSettings) -> dict[str, Any]:
    """Return what decides a scorer's labels: its name and settings, and hashes of its weights or its own module."""
    from spin.alignment.core.provenance import hash_file

    record: dict[str, Any] = {"scorer": settings.name, "scorer_model": settings.model}
    record |= {"scorer_max_length": settings.max_length, "scorer_dtype": settings.dtype}
    if settings.name in ("reward_model", "preference_model") and settings.model:
        record["scorer_weights"] = _weights_hash(settings.model)
        record["scorer_tokenizer"] = _tokenizer_hash(settings.model)
    if settings.name == "judge" and settings.model is None:  # whatever that server serves
        record["base_url"] = settings.base_url
    record |= {f"scorer_module_{name}": hash_file(path) for name, path in rule_files(settings.name).items()}
    return {name: value for name, value in record.items() if value is not None}


def rule_files(scorer: str) -> dict[str, Path]:
    """Return the module files of a scorer's terms ``module:function``, by module; :func:`scorer_settings` has imported them."""
    return module_files(*(term.rpartition("*")[2].strip() for term in scorer.split("+")))


@functools.cache
def _weights_hash(model: str) -> str:
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.models.folder import model_folder

    return hash_weights(model_folder(model))


@functools.cache
def _tokenizer_hash(model: str) -> str:
    """Return a hash of what a model is beside its weights: configuration, tokenizer, chat template."""
    from spin.alignment.core.provenance import hash_file, hash_text
    from spin.alignment.models.folder import model_files, model_folder

    files = [path for path in model_files(model_folder(model)) if "safetensors" not in path.name]
    return hash_text(*(f"{path.name}={hash_file(path)}" for path in files))
