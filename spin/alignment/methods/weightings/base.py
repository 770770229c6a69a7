"""What every token weighting receives and returns. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Weigh(Protocol):
    """Returns a number for each token of the chosen and of the rejected response."""

    def __call__(self, pair: PairTokens) -> tuple[list[float], list[float]]: ...


@dataclass(frozen=True)
class Weighting:
    """A way to weigh tokens.

    Without ``needs_models`` the numbers it returns are the weights. With it they are the gains with their sign turned on the
    rejected side (``+d`` and ``-d``: the larger, the more a token is to be learned from), and a transform of
    ``WEIGHT_TRANSFORMS`` makes weights of them. ``same_tokenizer`` says whether both models must share the data's ids.
    """

    weigh: Weigh
    needs_models: bool = False
    same_tokenizer: bool = True

    def __call__(self, pair: PairTokens) -> tuple[list[float], list[float]]:
        return self.weigh(pair)


def turned_gains(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return ``+d_t`` for the chosen response and ``-d_t`` for the rejected one (TIS-DPO, eq. 11: mu > 0 and mu < 0)."""
    return [float(gain) for gain in pair.chosen_gains], [-float(gain) for gain in pair.rejected_gains]
