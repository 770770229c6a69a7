"""Losses on pairs: one file per loss and one line per loss here."""

from __future__ import annotations

from spin.alignment.core.resolve import resolve
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.methods.labels import PAIR_WIN_PROB, REWARD, WIN_PROB, Label
from spin.alignment.methods.losses.base import Loss, LossInputs, LossOutputs
from spin.alignment.methods.losses.hinge import hinge
from spin.alignment.methods.losses.ipo import ipo
from spin.alignment.methods.losses.sigmoid import sigmoid
from spin.alignment.methods.losses.space import space
from spin.alignment.methods.losses.sppo import sppo, sppo_hard, sppo_reward, sppo_single
from spin.alignment.methods.losses.tspin import tspin
from spin.alignment.methods.soft_mean import soft_mean

LOSSES: dict[str, Loss] = {
    "hinge": Loss(hinge),
    "ipo": Loss(ipo),
    "sigmoid": Loss(sigmoid),
    "space": Loss(space),
    "sppo": Loss(sppo, reads=(WIN_PROB,)),
    "sppo_hard": Loss(sppo_hard),
    "sppo_reward": Loss(sppo_reward, reads=(REWARD,), compares=False),
    "sppo_single": Loss(sppo_single, reads=(PAIR_WIN_PROB,)),
    "tspin": Loss(tspin, responses=(*SIDES, INITIAL), needs_reference=False, least={"historical_weight": 0}),
}


def find_loss(name: str) -> Loss:
    """Return a loss by its configured name: one in :data:`LOSSES`, or ``module:function`` of a user's own file.

    Raises:
        InputError: the loss does not exist, or does not take :class:`LossInputs`.
    """
    found = resolve(LOSSES, name, "loss_type", takes=("inputs",))
    return found if isinstance(found, Loss) else Loss(found)


__all__ = ["LOSSES", "Label", "Loss", "LossInputs", "LossOutputs", "find_loss", "soft_mean"]
