"""Optimisers: RMSprop with bias correction, and the checks of ``optim`` and ``optim_args`` before a model is loaded.

Every other optimiser is the one transformers provides.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.rmsprop import rmsprop
from transformers import Trainer
from transformers.training_args import OptimizerNames

from spin.alignment.core.errors import InputError, suggestion

logger = logging.getLogger(__name__)

# Weights updated per call: limits the temporary (the square root of their state) to 256 MiB instead of the size of the model.
WEIGHTS_AT_ONCE = 2**26


class RMSprop(torch.optim.RMSprop):
    """RMSprop with a bias-corrected second moment, as in Adam.

    ``v`` starts at 0, so after ``t`` steps of a constant gradient it is ``(1 - alpha**t) * g**2``: the first step of plain
    RMSprop is ``1 / sqrt(1 - alpha)`` (10 by default) times as large as the learning rate suggests. Dividing ``v`` by
    ``1 - alpha**t`` gives ``lr * g / (sqrt(v / (1 - alpha**t)) + eps)``.

    There is one state per weight, in the weight's own precision. ``t`` is stored per weight, not per optimiser, because DeepSpeed
    ZeRO-3 calls :meth:`step` once for every group of weights that it swaps in. State dicts have the same format as those of
    ``torch.optim.RMSprop``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha is {alpha}: set it to 0 or more and below 1")
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, foreach=foreach)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step for every weight that has a gradient; return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for steps, weights in self._alike(group["params"]):
                self._update(group, steps, weights)
        return loss

    def _alike(self, weights: Iterable[torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield ``(t, weights)``: chunks of weights that are about to take their ``t``-th step."""
        by_steps: dict[int, list[torch.Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["square_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            by_steps[int(state["step"]) + 1].append(weight)
        for steps, alike in by_steps.items():
            # Several weights per call for speed, but not all at once for memory.
            chunk: list[torch.Tensor] = []
            size = 0
            for weight in alike:
                if chunk and size + weight.numel() > WEIGHTS_AT_ONCE:
                    yield steps, chunk
                    chunk, size = [], 0
                chunk.append(weight)
                size += weight.numel()
            yield steps, chunk

    def _update(self, group: dict[str, Any], steps: int, weights: list[torch.Tensor]) -> None:
        # Scaling lr and eps by sqrt(c) with v unchanged is the same as dividing v by c.
        scale = (1 - group["alpha"] ** steps) ** 0.5
        rmsprop(
            weights,
            [weight.grad for weight in weights],
            [self.state[weight]["square_avg"] for weight in weights],
            [],
            [],
            [self.state[weight]["step"] for weight in weights],
            foreach=group["foreach"],
            lr=group["lr"] * scale,
            alpha=group["alpha"],
            eps=group["eps"] * scale,
            weight_decay=group["weight_decay"],
            momentum=0.0,
            centered=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; ``t`` is copied to the CPU, where reading it does not synchronise with a GPU."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].to("cpu", copy=True)


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise ValueError
    return value


def _true_or_false(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


# How to parse a value, and a description of valid values.
_Kind = tuple[Callable[[str], Any], str]
_NUMBER: _Kind = (float, "a number")
_COUNT: _Kind = (int, "a whole number")
_SHARE: _Kind = (_share, "a number from 0 up to, but not including, 1")
_FLAG: _Kind = (_true_or_false, "true or false")

# The keys of optim_args that transformers passes on, by optimiser name (a pattern). weight_decay is not among them: it has a
# key of its own. Optimisers that match no pattern parse their own arguments.
_OPTIM_ARGS: dict[str, dict[str, _Kind]] = {
    "rmsprop": {"alpha": _SHARE, "bias_correction": _FLAG, "centered": _FLAG, "eps": _NUMBER, "momentum": _SHARE},
    "rmsprop_bnb(_8bit|_32bit)?": {"alpha": _SHARE, "eps": _NUMBER},
    "sgd": {"dampening": _NUMBER, "momentum": _SHARE, "nesterov": _FLAG},
    "adagrad": {"eps": _NUMBER, "lr_decay": _NUMBER},
    "(paged_)?ademamix(_8bit|_32bit)?": {
        **dict.fromkeys(("beta1", "beta2", "beta3"), _SHARE),
        "alpha": _NUMBER,
        "eps": _NUMBER,
        "t_alpha": _COUNT,
        "t_beta3": _COUNT,
    },
    "adafactor|adamw_torch(_fused)?|(paged_)?(adamw|lion)(_bnb)?(_8bit|_32bit)": {},
}


def uses_bitsandbytes(optim: str) -> bool:
    """Return whether a transformers optimiser is implemented by bitsandbytes."""
    return optim.startswith(("paged_", "lion", "ademamix", "rmsprop_bnb")) or optim in ("adamw_8bit", "adamw_bnb_8bit")


def takes_target_modules(optim: str) -> bool:
    """Return whether a transformers optimiser is made for the layers that ``optim_target_modules`` names."""
    return str(getattr(optim, "value", optim)).startswith(("galore_", "apollo_"))


def check_optimizer(optim: str, optim_args: str | None = None) -> dict[str, Any]:
    """Check an optimiser and its arguments before a model is loaded; return the parsed arguments.

    Raises:
        InputError: an unknown optimiser or argument, an invalid value, bitsandbytes is not installed, or a paged optimiser
            was requested without a GPU.
    """
    names = [str(item.value) for item in OptimizerNames]
    optim = str(getattr(optim, "value", optim))
    if optim not in names:
        raise InputError(
            f"unknown optim '{optim}'{suggestion(optim, names) or ': choose rmsprop, adamw_torch or adamw_8bit'}"
        )
    if uses_bitsandbytes(optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"optim {optim} needs bitsandbytes: pip install 'selfplay-spin[qlora]'")
    if optim.startswith("paged_") and not torch.cuda.is_available():
        raise InputError(f"optim {optim} pages its states out of GPU memory, but no GPU is available: remove 'paged_'")
    arguments = _read_arguments(optim, optim_args)
    if optim == "rmsprop" and arguments.get("bias_correction", True):
        for key in ("momentum", "centered"):
            if arguments.get(key):
                raise InputError(
                    f"optim_args has {key}, which bias-corrected rmsprop lacks: remove it, or add bias_correction=false"
                )
    return arguments


def _read_arguments(optim: str, optim_args: str | None) -> dict[str, Any]:
    known = next((keys for pattern, keys in _OPTIM_ARGS.items() if re.fullmatch(pattern, optim)), None)
    if not optim_args or known is None:
        return {}
    arguments = {}
    for part in optim_args.replace(" ", "").split(","):
        key, equals, text = part.partition("=")
        if not equals:  # "key" without "=value"
            raise InputError(f"optim_args is '{optim_args}': write it as key=value,key=value")
        if key == "weight_decay":
            raise InputError("optim_args has weight_decay, which is a key of its own: set weight_decay")
        if key not in known:
            valid = f"choose one of {', '.join(known)}" if known else "remove it"
            raise InputError(f"optim_args has the unknown key '{key}' for optim {optim}: {valid}")
        read, wanted = known[key]
        try:
            arguments[key] = read(text)
        except (ValueError, KeyError) as error:
            raise InputError(f"{key} in optim_args is '{text}': set it to {wanted}") from error
    return arguments


def optimizer_class_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return the optimiser class (or factory) and its keyword arguments, for ``Trainer.get_optimizer_cls_and_kwargs``.

    ``optim: rmsprop`` is :class:`RMSprop`, or PyTorch's own with ``optim_args: bias_correction=false``; every other name is
    resolved by transformers.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    arguments = check_optimizer(optim, args.optim_args)
    chosen, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    corrected = arguments.pop("bias_correction", True)
    if optim == "rmsprop" and corrected:
        arguments = {key: value for key, value in arguments.items() if value}  # momentum=0 and centered=false
        return RMSprop, {"lr": args.learning_rate, **arguments}
    if optim.startswith("rmsprop"):
        # transformers passes the arguments of bitsandbytes' RMSprop as strings: replace them with the parsed values.
        settings = {**settings, **arguments}
        times = (1 - settings.get("alpha", 0.99)) ** -0.5
        logger.info(
            "optim %s has no bias correction: its first steps are up to %.3g times the learning rate", optim, times
        )
    return chosen, settings
