"""Scorers: how good a response is. Each scorer is one file and one registry line here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from spin.alignment.rewards.answer_format import answer_format
from spin.alignment.rewards.base import GroupLabels, GroupScorer, Part, PromptGroup, Score, Scorer, ScorerSettings
from spin.alignment.rewards.checks import check_scorer_settings
from spin.alignment.rewards.exact_match import exact_match, stated_answer
from spin.alignment.rewards.find import find_rule, functions_of
from spin.alignment.rewards.ifeval import check_instruction_ids, ifeval
from spin.alignment.rewards.instructions import check_instructions, instructions
from spin.alignment.rewards.length_penalty import length_penalty
from spin.alignment.rewards.math_answer import math_answer, reasoned_answer
from spin.alignment.rewards.math_verify import math_verify
from spin.alignment.rewards.row_columns import asked_columns
from spin.alignment.rewards.rules import RuleScorer, no_reference

SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "format": answer_format,
    "ifeval": cast("Scorer", ifeval),
    "instructions": cast("Scorer", instructions),
    "length_penalty": length_penalty,
    "math_answer": math_answer,
    "math_verify": math_verify,
}

# Rules that are meaningless without a ground truth.
COMPARING: tuple[Scorer, ...] = (exact_match, math_answer, math_verify)

# What a majority votes on: the answer that a rule finds in a response, or None.
ANSWERS: dict[Callable[..., float | Score], Callable[[str], Hashable | None]] = {
    exact_match: stated_answer,
    math_answer: reasoned_answer,
    math_verify: reasoned_answer,
}

# Rules with a form of their own for a column -> a function that checks the columns of a row.
COLUMN_CHECKS: dict[Callable[..., float | Score], Callable[[Mapping[str, Any]], None]] = {
    ifeval: check_instruction_ids,
    instructions: check_instructions,
}


# The imports of models stay inside functions, so that rules need no torch.
def _reward_model(settings: ScorerSettings) -> GroupScorer:
    from spin.alignment.rewards.reward_model import RewardModel

    return RewardModel(settings)


def _preference_model(settings: ScorerSettings) -> GroupScorer:
    from spin.alignment.models.folder import model_folder, read_config_file
    from spin.alignment.rewards.pairrm import PairRM
    from spin.alignment.rewards.pairrm_checkpoint import is_pairrm
    from spin.alignment.rewards.preference_model import PreferenceModel

    assert settings.model is not None
    folder = model_folder(settings.model, needs_weights=settings.base_url is None)
    ours = settings.base_url is None and is_pairrm(read_config_file(folder))
    return (PairRM if ours else PreferenceModel)(settings)


def _judge(settings: ScorerSettings) -> GroupScorer:
    from spin.alignment.rewards.judge import Judge

    return Judge(settings)


GROUP_SCORERS: dict[str, Callable[[ScorerSettings], GroupScorer]] = {
    "judge": _judge,
    "preference_model": _preference_model,
    "reward_model": _reward_model,
}


# Models that compare two responses; a score of theirs needs something to compare with.
PAIRWISE = ("judge", "preference_model")


def find_scorer(name: str) -> Scorer:
    """Return a rule function, given a name in :data:`SCORERS`, ``module:function``, or a weighted sum (see ``find.py``).

    Raises:
        InputError: there is no such function, or it does not take (prompt, response, reference).
    """
    return find_rule(name, SCORERS, GROUP_SCORERS)


def check_scorer(settings: ScorerSettings) -> None:
    """Check everything that can be checked before a model is loaded or a server is contacted.

    Raises:
        InputError: naming the setting and the fix.
    """
    if settings.name not in GROUP_SCORERS:
        find_scorer(settings.name)
    check_scorer_settings(settings)


def make_scorer(settings: ScorerSettings) -> GroupScorer:
    """Check the settings and return the scorer; close it after use. A model is loaded when the first uncached response comes.

    Raises:
        InputError: as :func:`check_scorer`, or the model or server is unsuitable.
    """
    check_scorer(settings)
    if settings.name in GROUP_SCORERS:
        return GROUP_SCORERS[settings.name](settings)
    scorer = find_scorer(settings.name)
    return RuleScorer(settings.name, scorer, settings.score_reference, needs_reference(settings.name))


def needs_reference(name: str) -> bool:
    """Return whether a scorer needs a ground truth for every prompt."""
    return name not in GROUP_SCORERS and any(function in COMPARING for function in functions_of(find_scorer(name)))


def find_answer(name: str) -> Callable[[str], Hashable | None] | None:
    """Return how the answer of a response is extracted, or None if the scorer reads none, or is a sum of several."""
    functions = [] if name in GROUP_SCORERS else functions_of(find_scorer(name))
    return next((ANSWERS[item] for item in functions if len(functions) == 1 and item in ANSWERS), None)


def check_columns(name: str, columns: Mapping[str, Any]) -> None:
    """Check that a row has the columns that a scorer reads, in the form that it reads, before a model is loaded.

    Args:
        columns: the columns of the row for scorers (``scorer_columns``).

    Raises:
        InputError: a column is missing, or its value cannot be used.
    """
    if name in GROUP_SCORERS:
        return
    for function in functions_of(find_scorer(name)):
        asked_columns(cast("Callable[..., float]", function)).select(columns)
        for rule, check in COLUMN_CHECKS.items():
            if function is rule:
                check(columns)


__all__ = [
    "GROUP_SCORERS",
    "PAIRWISE",
    "SCORERS",
    "GroupLabels",
    "GroupScorer",
    "Part",
    "PromptGroup",
    "Score",
    "Scorer",
    "ScorerSettings",
    "check_columns",
    "check_scorer",
    "find_answer",
    "find_scorer",
    "make_scorer",
    "needs_reference",
    "no_reference",
]
