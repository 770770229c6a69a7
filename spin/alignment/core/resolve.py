"""Resolves a name in a configuration to a function: a registry entry, or ``module:function`` in the user's own code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError, suggestion

T = TypeVar("T")


def resolve(registry: Mapping[str, T], name: str, kind: str, takes: Iterable[str]) -> T | Any:
    """Return ``registry[name]``, or the function that ``module:function`` names.

    Args:
        kind: what the name is called in errors: ``loss_type``, ``pairing``.
        takes: the positional parameters that the function is called with: ``("rows",)``.

    Raises:
        InputError: an unknown name, or one that :func:`import_function` rejects.
    """
    if name in registry:
        return registry[name]
    if ":" in name:
        return import_function(name, kind, takes)
    names = ", ".join(sorted(registry))
    raise InputError(
        f"unknown {kind} '{name}': choose one of {names}, or write module:function{suggestion(name, registry)}"
    )


def import_function(path: str, kind: str, takes: Iterable[str], takes_more: bool = False) -> Callable[..., Any]:
    """Import ``module:function``, where the function may be a dotted attribute; the current folder is put on the module path.

    With ``takes_more`` the function may require further arguments, which the caller passes by name.

    Raises:
        InputError: no such module or function, or it cannot be called with the positional parameters ``takes``.
    """
    module_name, _, function_name = path.partition(":")
    wanted = tuple(takes)
    if not module_name or not function_name:
        raise InputError(f"{kind} '{path}' does not name a function: write module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        # Not removed afterwards: the function may import modules next to it when it is called.
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"module {module_name} of {kind} '{path}' cannot be imported ({reason}): fix it, or run from its folder"
        ) from error
    function: Any = module
    for part in function_name.split("."):
        if not hasattr(function, part):
            raise InputError(f"module {module_name} has no {function_name}: correct the {kind} '{path}'")
        function = getattr(function, part)
    called = f"{function_name.rpartition('.')[2]}({', '.join(wanted)})"
    if not callable(function):
        raise InputError(
            f"{function_name} of {kind} '{path}' is not callable: name a function of ({', '.join(wanted)})"
        )
    if not _takes(function, len(wanted), takes_more):
        numbers = {1: "one positional argument", 3: "three positional arguments"}
        raise InputError(
            f"{kind} '{path}' does not take {numbers.get(len(wanted), f'{len(wanted)} positional arguments')}: define it as "
            f"{called}"
        )
    return function


def _takes(function: Callable[..., Any], count: int, takes_more: bool) -> bool:
    try:
        signature = inspect.signature(function)
        (signature.bind_partial if takes_more else signature.bind)(*[""] * count)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature: the first call checks it
        return True
    return True


def module_files(*names: str) -> dict[str, Path]:
    """Return the files of the modules among names of the form ``module:function``, by module, once they have been imported.

    Their hashes are stored with the results, so that a changed function is detected.
    """
    found = {}
    for name in names:
        module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
        if module is not None and module.__file__:
            found[module.__name__] = Path(module.__file__)
    return found


def module_record(kind: str, name: str) -> dict[str, str]:
    """Return ``{kind_module_NAME: content hash}`` of the file behind ``module:function``; empty for a registered name."""
    from spin.alignment.core.provenance import hash_file

    return {f"{kind}_module_{module}": hash_file(path) for module, path in module_files(name).items()}
