"""Self-play fine-tuning of language models: generate, convert, train, repeat.

The names of ``__all__`` are the Python API, described in docs/python_api.md. Each is imported when it is first used, so that
``import spin`` takes no time and no program loads a library that it does not need.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin.alignment.core.errors import InputError
    from spin.alignment.data.preferences import load_preferences
    from spin.alignment.generation import BACKENDS
    from spin.alignment.methods.losses import LOSSES, LossInputs, LossOutputs, soft_mean
    from spin.alignment.methods.pairings import PAIRINGS
    from spin.alignment.methods.weightings import WEIGHT_TRANSFORMS, WEIGHTINGS
    from spin.alignment.rewards import SCORERS
    from spin.alignment.training.config import SPINConfig
    from spin.alignment.training.online.config import OnlineConfig
    from spin.alignment.training.online.trainer import OnlineTrainer
    from spin.alignment.training.trainer import SPINTrainer
    from spin.python_api import convert, evaluate, generate, run

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "LOSSES",
    "PAIRINGS",
    "SCORERS",
    "WEIGHTINGS",
    "WEIGHT_TRANSFORMS",
    "InputError",
    "LossInputs",
    "LossOutputs",
    "OnlineConfig",
    "OnlineTrainer",
    "SPINConfig",
    "SPINTrainer",
    "convert",
    "evaluate",
    "generate",
    "load_preferences",
    "run",
    "soft_mean",
]

# Public name -> the module that defines it. A test holds this table, __all__ and the imports above against each other.
_DEFINED_IN = {
    "BACKENDS": "spin.alignment.generation",
    "InputError": "spin.alignment.core.errors",
    "LOSSES": "spin.alignment.methods.losses",
    "LossInputs": "spin.alignment.methods.losses",
    "LossOutputs": "spin.alignment.methods.losses",
    "OnlineConfig": "spin.alignment.training.online.config",
    "OnlineTrainer": "spin.alignment.training.online.trainer",
    "PAIRINGS": "spin.alignment.methods.pairings",
    "SCORERS": "spin.alignment.rewards",
    "SPINConfig": "spin.alignment.training.config",
    "SPINTrainer": "spin.alignment.training.trainer",
    "WEIGHTINGS": "spin.alignment.methods.weightings",
    "WEIGHT_TRANSFORMS": "spin.alignment.methods.weightings",
    "convert": "spin.python_api",
    "evaluate": "spin.python_api",
    "generate": "spin.python_api",
    "load_preferences": "spin.alignment.data.preferences",
    "run": "spin.python_api",
    "soft_mean": "spin.alignment.methods.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'spin' has no attribute '{name}'")
    value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, whose public names stay what they are.

    ``import spin.generate`` imports the program ``spin/generate.py`` and then sets ``spin.generate`` to that module, in the place
    of the function. ``from spin.generate import main`` imports the program.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _DEFINED_IN and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
