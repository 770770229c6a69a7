"""SPPO (arXiv 2405.00675, eq. 3.6), its variants, and its form for individual rewards.

Each response's log-ratio is pulled towards a target of its own, where DPO constrains only the gap between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin.alignment.methods.labels import PAIR_WIN_PROB, REWARD, WIN_PROB
from spin.alignment.methods.losses.base import LossInputs, LossOutputs, outputs, sequence_logratios

if TYPE_CHECKING:
    from torch import Tensor


def sppo(inputs: LossInputs, beta: float = 0.1, eta: float | None = None) -> LossOutputs:
    """Return ``1/2 [(r_w - eta (P_w - 1/2))^2 + (r_l - eta (P_l - 1/2))^2]``: eq. 3.6 for the two selected responses.

    ``r`` are log-ratios (nats), ``P`` the win rates against the opponent's samples (label ``win_prob``), and ``eta`` defaults to
    ``1 / beta``.

    Raises:
        ValueError: the inputs have no win rates.
    """
    chosen_wins, rejected_wins = inputs.split(inputs.label(WIN_PROB.name))
    return _squares(inputs, chosen_wins - 0.5, rejected_wins - 0.5, beta, eta)


def sppo_single(inputs: LossInputs, beta: float = 0.1, eta: float | None = None) -> LossOutputs:
    """Return :func:`sppo` with ``p = P(chosen beats rejected)`` (label ``pair_win_prob``) instead of both win rates, so that
    the targets are ``+-eta (p - 1/2)``.

    Raises:
        ValueError: the inputs have no win probabilities.
    """
    wins, _ = inputs.split(inputs.label(PAIR_WIN_PROB.name))
    return _squares(inputs, wins - 0.5, 0.5 - wins, beta, eta)


def sppo_hard(inputs: LossInputs, beta: float = 0.1, eta: float | None = None) -> LossOutputs:
    """Return :func:`sppo` with the hard labels P_w = 1 and P_l = 0, so that the targets are ``+-eta / 2``. Needs no scorer."""
    import torch

    half = torch.tensor(0.5, dtype=torch.double, device=inputs.policy_logps.device)
    return _squares(inputs, half, -half, beta, eta)


def sppo_reward(inputs: LossInputs, beta: float = 0.1, eta: float | None = None) -> LossOutputs:
    """Return ``(r_i - eta reward_i)^2`` for each response separately, of shape ``(2B,)``; ``eta`` defaults to 1.

    SPPO's online form (eq. 3.6 with a reward instead of the win rate): the label ``reward`` already has its baseline, the soft
    mean, subtracted. ``beta`` scales only the logged rewards.

    Raises:
        ValueError: the inputs have no rewards.
    """
    import torch

    rewards = inputs.label(REWARD.name)  # (2B,), like the concatenated log-ratios below
    chosen, rejected = sequence_logratios(inputs)
    losses = (torch.cat((chosen, rejected)) - (1.0 if eta is None else eta) * rewards) ** 2
    return outputs(losses, chosen, rejected, beta)


def _squares(
    inputs: LossInputs, chosen_target: Tensor, rejected_target: Tensor, beta: float, eta: float | None
) -> LossOutputs:
    scale = 1 / beta if eta is None else eta  # nats per unit of win rate
    chosen, rejected = sequence_logratios(inputs)
    losses = ((chosen - scale * chosen_target) ** 2 + (rejected - scale * rejected_target) ** 2) / 2
    return outputs(losses, chosen, rejected, beta)
