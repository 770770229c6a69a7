"""The interface of token weightings and their declared properties. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class PairTokens:
    """The response tokens of one pair, including the end-of-turn token if the response has one.

    ``chosen_gains`` and ``rejected_gains`` are ``d_t = log pi_plus(y_t) - log pi_minus(y_t)`` in nats, one per token. They may
    be shorter than the ids: tokens beyond the maximum length that was scored have no gain.
    """

    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    chosen_gains: Sequence[float] = ()
    rejected_gains: Sequence[float] = ()


# Maps one number per token of a response to one weight per token.
Transform = Callable[..., list[float]]

# Returns one number per token of the chosen and of the rejected response.
Weigh = Callable[[PairTokens], tuple[list[float], list[float]]]


class Compares(Enum):
    """Which two models a weighting compares to compute token gains."""

    NOTHING = "no models: the numbers it returns are the weights"
    TRAINED = "a model trained on the pairs with one trained on the reversed pairs, of one tokenizer"
    TEACHER = "a stronger teacher with the student; their tokenizers may differ"
    STORED = "two models, elsewhere: their log-prob differences come with the pairs"


@dataclass(frozen=True)
class Weighting:
    """A token weighting. A plain function is a weighting that compares no models.

    If it compares nothing, the numbers it returns are the weights. Otherwise they are the gains, negated on the rejected side
    (``+d`` and ``-d``: the larger, the more should be learned from a token), and a transform of ``WEIGHT_TRANSFORMS`` maps them
    to weights. ``constant``: equal weights are intended, so no warning is given.
    """

    weigh: Weigh
    compares: Compares = Compares.NOTHING
    constant: bool = False

    def __call__(self, pair: PairTokens) -> tuple[list[float], list[float]]:
        return self.weigh(pair)

    @property
    def needs_models(self) -> bool:
        return self.compares in (Compares.TRAINED, Compares.TEACHER)

    @property
    def gives_gains(self) -> bool:
        """Whether a transform maps its numbers to weights; otherwise they are the weights."""
        return self.compares is not Compares.NOTHING


def turned_gains(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return ``+d_t`` for the chosen response and ``-d_t`` for the rejected one (TIS-DPO, eq. 11: mu > 0 and mu < 0)."""
    return [float(gain) for gain in pair.chosen_gains], [-float(gain) for gain in pair.rejected_gains]
