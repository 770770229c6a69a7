"""Diversity and repetition of responses, from their token ids: no language needs to be split into words.

The numbers of two models can be compared if they share a tokenizer, as all models of a run do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

REPEATED_N = 4  # as in seq-rep-4 of Welleck et al.: shorter n-grams also recur in good text


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the n-grams of a sequence, in order; none if it is shorter than ``n``."""
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def distinct_n(responses: Iterable[Sequence[int]], n: int) -> float | None:
    """Return the number of different n-grams in all responses divided by that of all n-grams; None without any.

    J. Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (arXiv 1510.03055). It falls as
    responses get longer or more numerous, so only compare it on the same prompts.
    """
    found = [gram for ids in responses for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else None


def repetition_rate(ids: Sequence[int], n: int = REPEATED_N) -> float:
    """Return the share of a response's n-grams that it has had before: 1 - different / all; 0 for a shorter response.

    Seq-rep-n of S. Welleck et al., Neural Text Generation with Unlikelihood Training (arXiv 1908.04319).
    """
    found = ngrams(ids, n)
    return 1.0 - len(set(found)) / len(found) if found else 0.0
