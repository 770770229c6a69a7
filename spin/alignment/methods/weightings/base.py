"""What every token weighting receives and returns, and what it says of itself. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class PairTokens:
    """The response tokens of one pair, the end-of-turn token included where the response has one.

    ``chosen_gains`` and ``rejected_gains`` hold ``d_t = log pi_plus(y_t) - log pi_minus(y_t)`` in nats, one number for each of
    the first tokens of that side: those beyond the longest sequence that was scored have none.
    """

    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    chosen_gains: Sequence[float] = ()
    rejected_gains: Sequence[float] = ()


# Turns the numbers of one response's tokens into their weights.
Transform = Callable[..., list[float]]

# Returns a number for each token of the chosen and of the rejected response.
Weigh = Callable[[PairTokens], tuple[list[float], list[float]]]


class Compares(Enum):
    """Which two models a weighting compares to find the gains of tokens."""

    NOTHING = "no models: the numbers it returns are the weights"
    TRAINED = "a model trained on the pairs with one trained on the reversed pairs, of one tokenizer"
    TEACHER = "a stronger teacher with the student; their tokenizers may differ"


@dataclass(frozen=True)
class Weighting:
    """A way to weigh tokens. A plain function is one too: it compares no models.

    Without models the numbers it returns are the weights. With them they are the gains with their sign turned on the rejected
    side (``+d`` and ``-d``: the larger, the more a token is to be learned from), and a transform of ``WEIGHT_TRANSFORMS`` makes
    weights of them. ``constant``: equal weights are what it is for, not a mistake.
    """

    weigh: Weigh
    compares: Compares = Compares.NOTHING
    constant: bool = False

    def __call__(self, pair: PairTokens) -> tuple[list[float], list[float]]:
        return self.weigh(pair)

    @property
    def needs_models(self) -> bool:
        return self.compares is not Compares.NOTHING


def turned_gains(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return ``+d_t`` for the chosen response and ``-d_t`` for the rejected one (TIS-DPO, eq. 11: mu > 0 and mu < 0)."""
    return [float(gain) for gain in pair.chosen_gains], [-float(gain) for gain in pair.rejected_gains]
