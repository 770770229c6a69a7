"""How many faults of each kind: a short form for CI and a long one (``python -m tests.faults``)."""

from __future__ import annotations

from typing import Any

EVERY = -1
_CHEAP = {"kill": 8, "full": 5, "small_disk": 2, "bit_flip": 4}
_DEAR = {"kill": 3, "full": 2, "small_disk": 1, "bit_flip": 2}
_ALL = {"kill": EVERY, "full": EVERY, "small_disk": 20, "bit_flip": 40}

# By the module that injects the faults, then by what is disturbed.
SHORT: dict[str, dict[str, dict[str, Any]]] = {
    "program_faults": {
        "reformat": _CHEAP,
        "generate": _DEAR,
        "convert_data": _CHEAP,
        "estimate_weights": _DEAR,
        "evaluate_model": _DEAR,
        "run_sft": _DEAR,
        "run_spin": _DEAR,
        "run_online": _DEAR,
    },
    "run_storm": {
        "spin-run-offline": {"signals": 2, "others": True, "spares_server": True},
        "spin-run-online": {"signals": 1, "spares_server": True},
        "spin-run-weights": {"signals": 1, "spares_server": True},
    },
    "many_writers": {"writers": {"processes": 16, "kills": 8}},
}
LONG: dict[str, dict[str, dict[str, Any]]] = {
    "program_faults": dict.fromkeys(SHORT["program_faults"], _ALL),
    "run_storm": {
        "spin-run-offline": {"signals": 80, "others": True},
        "spin-run-online": {"signals": 60},
        "spin-run-weights": {"signals": 60},
    },
    "many_writers": {"writers": {"processes": 64, "kills": 64}},
}
