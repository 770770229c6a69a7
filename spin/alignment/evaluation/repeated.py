"""Several responses to one prompt: pass@k, and majority voting. Pure functions of one prompt's scores and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(count: int, right: int, k: int) -> float:
    """Return the probability that at least one of ``k`` responses, drawn from ``count`` without replacement, is right.

    1 - C(n - c, k) / C(n, k) for c right responses of n: the unbiased estimator of M. Chen et al., Evaluating Large Language
    Models Trained on Code (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: ``k`` is not between 1 and ``count``.
    """
    if not 1 <= k <= count:
        raise ValueError(f"pass@{k} needs at least {k} responses, but there are {count}")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def ks_of(count: int) -> list[int]:
    """Return the k that pass@k is given for: the powers of two below ``count``, and ``count`` itself."""
    powers = [2**exponent for exponent in range(count.bit_length()) if 2**exponent < count]
    return [*powers, count]


def majority_score(answers: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """Return the score of the most frequent answer (maj@n, self-consistency: arXiv 2203.11171).

    An answer's score is the mean over the responses that give it. Of several answers that are equally frequent, one would be
    drawn at random, so their scores are averaged. A response without an answer (None) has no vote; without any vote it is 0.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, number in votes.items() if number == most]
    given = list(zip(answers, scores, strict=True))
    means = [math.fsum(score for answer, score in given if answer == winner) / most for winner in winners]
    return math.fsum(means) / len(means)
