"""The names of splits: which splits a name may stand for, and which are held out."""

from __future__ import annotations

import re

from spin.alignment.core.errors import InputError

PREFERENCES = "_prefs"
_HELD_OUT = frozenset(
    {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"}
)
_TRAINED = frozenset({"train", "training"})


def split_words(split: str) -> list[str]:
    """Return the words of a split's name: ``train`` and ``prefs`` of ``train_prefs``."""
    return [word.lower() for word in re.findall(r"[^\W\d_]+", split)]


def is_held_out(split: str) -> bool:
    """Return whether a split is evaluated on and not trained on: one of its words is ``test``, ``validation``, ``eval`` ...

    Raises:
        InputError: the name says both that and ``train``.
    """
    words = set(split_words(split))
    held_out = words & _HELD_OUT or {"held", "out"} <= words
    if held_out and words & _TRAINED:
        raise InputError(f"the split '{split}' is named both for training and for evaluation: rename it")
    return bool(held_out)


def same_splits(split: str) -> tuple[str, ...]:
    """Return the names under which a split is looked for, in order: with and without the ending ``_prefs``."""
    plain = split.removesuffix(PREFERENCES)
    return (split, plain) if split != plain else (split, plain + PREFERENCES)


def preference_split(split: str) -> str:
    """Return the name under which the preference pairs of a split are looked for first."""
    return split.removesuffix(PREFERENCES) + PREFERENCES
