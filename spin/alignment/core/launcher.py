"""What a launcher (accelerate, torchrun) says to its processes in environment variables, checked before it is used."""

from __future__ import annotations

import os

from spin.alignment.core.errors import InputError

# Whole numbers, with the smallest that makes sense. A rank of -1 means that there is only one process.
_NUMBERS = {
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "RANK": -1,
    "LOCAL_RANK": -1,
    "MASTER_PORT": 1,
}
_FIX = "start the program with accelerate or torchrun, or unset the variable"


def check_launch_numbers() -> None:
    """Check the numbers that a launcher sets.

    Raises:
        InputError: a variable is not such a number, or the rank is not one of the processes; it is named.
    """
    for name, least in _NUMBERS.items():
        value = os.environ.get(name)
        if value is not None and _whole(value, least) is None:
            raise InputError(
                f"the environment variable {name} is '{value}', not a whole number from {least} on: {_FIX}"
            )
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        processes = int(os.environ.get(size, "0"))
        if processes and int(os.environ.get(name, "0")) >= processes:
            raise InputError(
                f"the environment variable {name} is {os.environ[name]}, but {size} is {processes}: {_FIX}"
            )


def _whole(value: str, least: int) -> int | None:
    try:
        number = int(value)
    except ValueError:
        return None
    return number if number >= least else None


def is_main_process() -> bool:
    """Return whether this process is the only one of its training, or the first."""
    return int(os.environ.get("RANK", "0")) <= 0


def check_rendezvous() -> None:
    """Check that processes of one training can find each other: several of them need an address, a port and a rank each.

    Raises:
        InputError: one of the variables is missing; it is named.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if processes > 1 else ():
        if not os.environ.get(name):
            raise InputError(f"the environment variable WORLD_SIZE is {processes}, but {name} is not set: {_FIX}")
