"""Secrets in settings: they reach programs through the environment, and no file contains them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from spin.alignment.core.errors import InputError

# Settings whose value is a secret, and the variable that the libraries read it from.
VARIABLES = {"hub_token": "HF_TOKEN"}
_NAMES = frozenset({"token", "api_key", "apikey", "password", "passwd", "secret", "use_auth_token", "authorization"})
_ENDINGS = ("hub_token", "_api_key", "_password", "_secret", "_secret_key", "access_token", "auth_token", "_access_key")
# https://user:password@host, https://token@host, and ?api_key=... in an address.
_ADDRESS = re.compile(r"\w+://[^/\s@?#]+@|://\S*[?&](?:api[_-]?key|key|[\w-]*token|password|secret)=", re.IGNORECASE)


def is_secret(key: str) -> bool:
    """Return whether a setting, by its name, contains a token, key or password. Dots may separate levels."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    return name in VARIABLES or name in _NAMES or name.endswith(_ENDINGS)


def without_secrets(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return nested settings without those that are secret."""
    return {
        key: without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not is_secret(str(key))
    }


def secret_variables(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that replace the secret settings of one program."""
    return {variable: str(values[key]) for key, variable in VARIABLES.items() if values.get(key) is not None}


def refuse_stored_secrets(values: Mapping[str, Any], source: str) -> None:
    """Refuse secrets that would be written to files: those without a variable of their own, and passwords in addresses.

    Raises:
        InputError: naming the setting, but not its value.
    """
    for key, value in _leaves(values):
        name = key.rpartition(".")[2]
        if isinstance(value, str) and _ADDRESS.search(value):
            raise InputError(
                f"'{key}' in {source} has a password or key in its address, which would be stored with the results: remove it, "
                "and set OPENAI_API_KEY or HF_TOKEN in the environment"
            )
        if isinstance(value, str) and value and name not in VARIABLES and is_secret(name):
            raise InputError(
                f"'{key}' in {source} is a secret, which would be stored with the results: remove it, and set it in the "
                "environment (HF_TOKEN, OPENAI_API_KEY, WANDB_API_KEY)"
            )


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value that is not a mapping or list; keys are values too, as they may be paths."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield prefix.rstrip("."), key
            yield from _leaves(value, f"{prefix}{key}.")
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, prefix)
    else:
        yield prefix.rstrip("."), values
