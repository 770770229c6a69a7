"""Responses that keep an instruction by saying nothing: too few different words, or the same few over and over."""

from __future__ import annotations

from spin.alignment.rewards.instructions.counts import words_of

# A response of fewer different words answers none of the prompts that have instructions on its form.
FEWEST_WORDS = 4
# Ordinary prose of up to 200 words has more than half different words; loops of a model have a tenth.
LOWEST_DISTINCT_SHARE = 0.3


def is_degenerate(response: str, may_be_short: bool = False) -> bool:
    """Return whether a response is empty, has fewer than four different words, or repeats itself: fewer than three in ten of its
    words are different.

    Args:
        may_be_short: a single word can be a full answer.
    """
    words = [word.lower() for word in words_of(response)]
    different = len(set(words))
    return different < (1 if may_be_short else FEWEST_WORDS) or different < LOWEST_DISTINCT_SHARE * len(words)
