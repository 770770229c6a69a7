"""YAML files with overlays, ``--key=value`` overrides, and the dataclasses built from them.

A configuration is a flat mapping. ``extends: other.yaml`` (relative to the file) starts from another one, so a later
iteration is a few lines, not a copy. Everything is checked here, before a model or a data set is opened.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError, shown, suggestion
from spin.alignment.core.paths import checked_path
from spin.alignment.core.yaml_text import parse_yaml

C = TypeVar("C")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, resolving ``extends`` first; nested mappings are merged key by key.

    Raises:
        InputError: the file is missing, is not valid YAML, is not a mapping, or extends itself.
    """
    values: dict[str, Any] = {}
    for _, content in load_chain(path):
        values = merge(values, content)
    return values


def load_chain(path: str | Path, _seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Read a YAML file and those it extends; return each with its own content, the file that extends nothing first.

    Raises:
        InputError: as :func:`load_yaml`.
    """
    path = Path(checked_path(str(path), "the configuration file"))
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the path of a YAML file")
    if not path.is_file():
        raise InputError(f"configuration file {path} does not exist: give the path of a YAML file")
    if path.resolve() in _seen:
        raise InputError(f"{path} extends itself: remove the circular 'extends'")
    content = read_mapping(path)
    parent = content.pop("extends", None)
    if not isinstance(parent, str | None):
        raise InputError(f"'extends' in {path} is {shown(parent)}: give the path of another YAML file")
    below = [] if parent is None else load_chain(path.parent / parent, (*_seen, path.resolve()))
    return [*below, (path, content)]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, ``extends`` included; an empty file is an empty mapping.

    Raises:
        InputError: the file cannot be read, is not valid YAML, or is not a mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): make it readable, or give another file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8 (byte {error.start}): give a YAML file, saved as UTF-8"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML here ({error}): correct the file") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain 'key: value' lines: write one setting per line")
    return content


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of ``overlay`` on top; mappings are merged, except ``dataset_mixer``."""
    merged = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "dataset_mixer"
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Turn ``--key=value`` arguments into a mapping; values are YAML, dots reach into nested mappings.

    Raises:
        InputError: an argument is not of this form.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not separator or not all(key.split(".")):
            raise InputError(f"cannot read the argument {shown(argument)}: write settings as --key=value")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise InputError(f"cannot read the value of --{key} ({shown(text)}) as YAML ({error}): quote it") from error
        for part in reversed(key.split(".")[1:]):
            value = {part: value}
        overrides = merge(overrides, {key.split(".")[0]: value})
    return overrides


def load_config(path: str | Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file and put the command-line overrides on top."""
    return merge(load_yaml(path), parse_overrides(arguments))


def build(config_class: type[C], values: Mapping[str, Any], source: str) -> C:
    """Build a settings dataclass from a mapping, converting each value to the annotated type.

    Raises:
        InputError: an unknown key (the closest valid one is named), a value of the wrong type, or a missing key.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise unknown_key(key, source, fields)
    hints = typing.get_type_hints(config_class)
    converted = {key: convert(value, hints[key], f"'{key}' in {source}") for key, value in values.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in converted:
            raise InputError(f"{source} lacks the key '{name}': add it")
    try:
        return config_class(**converted)
    except InputError as error:  # checks of a class do not know where its values come from
        raise error if source in str(error) else InputError(f"{error} (in {source})") from error


def unknown_key(key: str, source: str, known: Iterable[str]) -> InputError:
    """Return the error for a key that nothing reads, with the closest key that exists."""
    fix = suggestion(str(key), known) or ": remove it, or see --help for the keys that exist"
    return InputError(f"unknown key {shown(key)} in {source}{fix}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML value to a type hint: ``1e-5`` (a string in YAML) to float, an int to float, unions by trying each member.

    A path becomes a string, and a single value becomes a list of one item where a list is expected.

    Raises:
        InputError: the value has the wrong type; ``where`` names the key and the file.
    """
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), where)
    if origin is typing.Literal:
        if any(type(value) is type(item) and value == item for item in typing.get_args(hint)):
            return value
        raise InputError(f"{where} is {shown(value)}: choose one of {', '.join(map(str, typing.get_args(hint)))}")
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    plain = origin or hint
    if plain in (list, tuple, dict):
        return _convert_many(value, hint, plain, where)
    return _convert_one(value, plain, hint, where)


def _convert_one(value: Any, plain: Any, hint: Any, where: str) -> Any:
    if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif plain is bool and isinstance(value, bool):
        return value
    elif plain is int and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) or (math.isfinite(value) and int(value) == value):
            return int(value)
    elif plain is str and isinstance(value, str | int | float | os.PathLike) and not isinstance(value, bool):
        return value if isinstance(value, str) else _text_of(value)
    elif isinstance(plain, type) and issubclass(plain, enum.Enum):
        if value in [item.value for item in plain]:
            return value
    elif isinstance(plain, type) and plain not in (bool, int, str) and isinstance(value, plain):
        return value
    raise InputError(f"{where} is {shown(value)}, which is not {_describe(hint)}: correct the value")


def _text_of(value: Any) -> str:
    """Return the text of a path, or of a number as it is written in the configuration."""
    return str(getattr(value, "text", value)) if isinstance(value, int | float) else str(value)


def _convert_many(value: Any, hint: Any, plain: type, where: str) -> Any:
    """Convert a list, tuple or mapping and its items. A mapping may also be written as a list of ``key=value`` strings."""
    inner = typing.get_args(hint)
    if plain is dict:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = key_values(value, where)
        if isinstance(value, Mapping):
            kinds = inner or (Any, Any)
            return {convert(key, kinds[0], where): convert(item, kinds[1], where) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        return plain(convert(item, inner[0], where) for item in value) if inner else plain(value)
    elif isinstance(value, str | int | float) and not isinstance(value, bool) and inner:
        return plain([convert(value, inner[0], where)])
    raise InputError(f"{where} is {shown(value)}, which is not {_describe(hint)}: correct the value")


def key_values(texts: Iterable[str], where: str) -> dict[str, str]:
    """Parse strings such as ``mu=1`` into a mapping.

    Raises:
        InputError: a string of another form, or a repeated key; ``where`` names the key or flag.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key in pairs:
            raise InputError(f"{where} contains {shown(text)}: write each setting once as key=value, such as mu=1")
        pairs[key] = value
    return pairs


def _convert_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    # The member of the value's own type is tried first: 1 stays an int in `float | int`.
    kinds = (type(value), *type(value).__bases__)
    exact = [choice for choice in choices if isinstance(choice, type) and choice in kinds]
    for choice in exact + [choice for choice in choices if choice is not type(None)]:
        try:
            return convert(value, choice, where)
        except InputError:
            continue
    wanted = " or ".join(_describe(choice) for choice in choices)
    raise InputError(f"{where} is {shown(value)}, which is not {wanted}: correct the value")


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "empty"}
    names |= {dict: "a mapping", list: "a list", tuple: "a list"}
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return names.get(typing.get_origin(hint) or hint, str(getattr(hint, "__name__", hint)))


def split_config(values: Mapping[str, Any], classes: Sequence[type], source: str) -> list[dict[str, Any]]:
    """Distribute a flat mapping over settings dataclasses by their field names.

    Raises:
        InputError: a key that none of them has (the closest one is named).
    """
    names = [{field.name for field in dataclasses.fields(item) if field.init} for item in classes]
    parts: list[dict[str, Any]] = [{} for _ in classes]
    for key, value in values.items():
        owners = [index for index, known in enumerate(names) if key in known]
        if not owners:
            raise unknown_key(key, source, set().union(*names))
        for index in owners:  # classes may share a key, and each of them needs it
            parts[index][key] = value
    return parts
