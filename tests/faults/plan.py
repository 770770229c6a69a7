"""How many faults of each kind: a short form for CI and a long one (``python -m tests.faults``)."""

from __future__ import annotations

from typing import Any

EVERY = -1
_CHEAP = {"kill": 8, "full": 5, "small_disk": 2, "bit_flip": 4}
_DEAR = {"kill": 3, "full": 2, "small_disk": 1, "bit_flip": 2}
_ALL = {"kill": EVERY, "full": EVERY, "small_disk": 20, "bit_flip": 40}

SHORT: dict[str, Any] = {
    "programs": {
        "reformat": _CHEAP,
        "generate": _DEAR,
        "convert": _CHEAP,
        "weights": _DEAR,
        "evaluate": _DEAR,
        "run_sft": _DEAR,
        "run_spin": _DEAR,
        "run_online": _DEAR,
    },
    "signals": {"offline": 2, "online": 1, "weights": 1},
    "writers": 16,
}
LONG: dict[str, Any] = {
    "programs": dict.fromkeys(SHORT["programs"], _ALL),
    "signals": {"offline": 80, "online": 60, "weights": 60},
    "writers": 64,
}
