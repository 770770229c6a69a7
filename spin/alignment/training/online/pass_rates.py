"""pass@k and best-of-n of held-out prompts that were answered several times."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def ks_of(samples: int) -> list[int]:
    """Return the k of pass@k that are logged for so many responses per prompt: the powers of two below it, and itself."""
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent < samples]
    return [*powers, samples]


def pass_at(k: int, samples: int, passed: int) -> float:
    """Return the probability that at least one of k responses drawn from ``samples`` passes, of which ``passed`` do: the
    unbiased estimate ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374)."""
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def held_out_sums(scores: Sequence[Sequence[float | None]], samples: int, passing: float) -> list[float]:
    """Return sums over prompts: their number, their best scores, and their pass@k for each of :func:`ks_of`.

    A prompt counts if all of its responses have a score. ``passing`` is the lowest score of a response that passes.
    """
    complete = [[score for score in own if score is not None] for own in scores]
    complete = [own for own in complete if len(own) == samples]
    passed = [sum(score >= passing for score in own) for own in complete]
    rates = [sum(pass_at(k, samples, count) for count in passed) for k in ks_of(samples)]
    return [float(len(complete)), float(sum(map(max, complete))), *rates]


def pass_log(sums: Sequence[float], samples: int, prefix: str) -> dict[str, float]:
    """Return the means over prompts from the sums of all processes; empty if no prompt counts."""
    prompts, best, *rates = sums
    if not prompts:
        return {}
    named = dict(zip(pass_names(samples), (best, *rates), strict=True))
    return {f"{prefix}_{name}": value / prompts for name, value in named.items()}


def pass_names(samples: int) -> list[str]:
    """Return the names of the measures for so many responses per prompt: ``best_of_4``, ``pass_at_1``, ..."""
    return [f"best_of_{samples}", *(f"pass_at_{k}" for k in ks_of(samples))]
