"""Settings declared once: a dataclass field with its type, default, range and help sentence.

The parser and ``--help`` of a program (``core/flags.py``), the keys of a configuration file and their tables in the docs
(``core/key_tables.py``), and the checks made before anything is loaded all read the declaration::

    @dataclass(frozen=True, kw_only=True)
    class ExampleConfig:
        model: str = setting(help="model folder or Hub name")
        top_p: float = setting(1.0, "nucleus sampling", gt=0, le=1)

        def __post_init__(self) -> None:
            check_settings(self)
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar

from spin.alignment.core.config import convert
from spin.alignment.core.errors import InputError, shown
from spin.alignment.core.paths import check_output_file, check_output_folder, checked_name, checked_path

C = TypeVar("C")
_KEY = "setting"


@dataclass(frozen=True)
class Declaration:
    """What a field declares besides its type and default.

    Attributes:
        help: one sentence or fragment; the only documentation of the setting.
        group: heading under which help and docs list this field and those after it, up to the next heading.
        ge, gt, le, lt: the range of a number, or of every number of a list. Numbers are always finite.
        path: the text (every text of a list, every key of a mapping) is a path, or a Hub name, that is read ("input"), or the
            path of a "folder" or "file" that is written, or the "name" of one (of a split); see ``core/paths.py``.
        unset: what the default ``None`` stands for, such as "the model's context".
        set_by_run: ``spin run`` sets the value itself, so no section of its configuration may contain the key.
        recorded: True: the value is stored in the provenance of the program's output. False: it does not affect results, so
            trainings that differ only in it count as the same.
        origin: the class and field that :func:`same_as` copied this one from.
    """

    help: str
    group: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    path: Literal["", "input", "folder", "file", "name"] = ""
    unset: str = ""
    set_by_run: bool = False
    recorded: bool | None = None
    origin: tuple[type, str] | None = None

    def allows(self, value: float) -> bool:
        """Return whether a number is finite and in the range."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def range(self) -> str:
        """Return the range in words: ``0 or more``, ``above 0 and at most 1``."""
        bounds = []
        if self.ge is not None:
            bounds.append(f"{_plain(self.ge)} or more")
        if self.gt is not None:
            bounds.append(f"a number above {_plain(self.gt)}")
        if self.le is not None:
            bounds.append(f"at most {_plain(self.le)}")
        if self.lt is not None:
            bounds.append(f"below {_plain(self.lt)}")
        return " and ".join(bounds) or "a finite number"


def _plain(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"


def setting(default: Any = MISSING, help: str = "", **facts: Any) -> Any:
    """Declare a field of a settings dataclass; without a default it is required. See :class:`Declaration` for ``facts``.

    A list or mapping used as the default is copied for each instance.
    """
    return _field(default, Declaration(help, **facts))


def same_as(config_class: type, name: str, default: Any = MISSING, **facts: Any) -> Any:
    """Declare a field like one of another class, except for the facts given here; :func:`part_of` maps it back.

    ``group``, ``set_by_run`` and ``recorded`` are not copied: they depend on the program, not on the setting.
    """
    field = config_class.__dataclass_fields__[name]  # type: ignore[attr-defined]
    own = {"group": "", "set_by_run": False, "recorded": None, **facts}
    declaration = dataclasses.replace(declaration_of(field), origin=(config_class, name), **own)
    return _field(default_of(field) if default is MISSING else default, declaration)


def _field(default: Any, declaration: Declaration) -> Any:
    metadata = {"help": declaration.help, _KEY: declaration}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(copy.copy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declaration_of(field: dataclasses.Field[Any]) -> Declaration:
    """Return the declaration of a field; for a field of another library, one with its help text only."""
    return field.metadata.get(_KEY) or Declaration(str(field.metadata.get("help", "")))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; ``MISSING`` if the field is required."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def settings_of(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a class that were declared with :func:`setting` or :func:`same_as`, by name, in order."""
    fields = dataclasses.fields(config_class)
    return {field.name: field for field in fields if field.init and _KEY in field.metadata}


def grouped(config_class: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the settings of a class by heading, in order of declaration."""
    groups: dict[str, list[dataclasses.Field[Any]]] = {}
    heading = ""
    for field in settings_of(config_class).values():
        heading = declaration_of(field).group or heading
        groups.setdefault(heading, []).append(field)
    return groups


def hints_of(config_class: type) -> dict[str, Any]:
    """Return the type of every field of a class."""
    return typing.get_type_hints(config_class)


def check_settings(config: Any, name_of: Callable[[str], str] = str) -> None:
    """Check every declared setting of an instance: right type, known choice, finite, in range; for ``__post_init__``.

    Values of a compatible type (a path for a string, a tuple for a list) are converted in place. ``name_of`` maps a field to
    the name that the user sees.

    Raises:
        InputError: naming the setting, its value and the values allowed.
    """
    hints = hints_of(type(config))
    for name, field in settings_of(type(config)).items():
        value = checked_value(field, hints[name], getattr(config, name), name_of(name))
        object.__setattr__(config, name, value)  # works for frozen dataclasses too


def checked_value(field: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
    """Return a value converted to the type of its field; ``where`` names it in errors.

    Raises:
        InputError: another type, an unknown choice, a number that is not finite or out of range.
    """
    value = convert(value, hint, where)
    if _KEY in field.metadata:
        # The values of a section are checked by the program that it belongs to.
        numbers = () if isinstance(value, Mapping) and Any in typing.get_args(hint) else numbers_in(value)
        _check_numbers(declaration_of(field), numbers, where)
        return _checked_texts(declaration_of(field), value, where, may_be_empty=default_of(field) == "")
    return value


def _check_numbers(declaration: Declaration, numbers: Iterable[float], where: str) -> None:
    for number in numbers:
        if not declaration.allows(number):
            raise InputError(f"{where} is {shown(number)}: set it to {declaration.range()}")


def _checked_texts(declaration: Declaration, value: Any, where: str, may_be_empty: bool) -> Any:
    for text in texts_in(value):
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise InputError(f"{where} is {shown(text)}, which is not text in UTF-8: correct the value")
        if "\0" in text:
            raise InputError(f"{where} is {shown(text)}, which has a NUL character in it: correct the value")
    check = checked_name if declaration.path == "name" else checked_path
    return _with_paths(value, where, may_be_empty, check) if declaration.path else value


def _with_paths(value: Any, where: str, may_be_empty: bool, check: Callable[[str, str], str]) -> Any:
    """Return the path or paths of a setting, checked and with ``~`` expanded."""
    if isinstance(value, str):
        return check(value, where) if value or not may_be_empty else value
    if isinstance(value, Mapping):
        return {check(key, where): item for key, item in value.items()}
    return type(value)(check(item, where) for item in value) if isinstance(value, list | tuple) else value


def check_outputs(config: Any, name_of: Callable[[str], str] = str) -> None:
    """Check that the folders and files that the settings name for writing can be written; nothing is written.

    Raises:
        InputError: naming the setting and the path.
    """
    checks = {"folder": check_output_folder, "file": check_output_file}
    for name, field in settings_of(type(config)).items():
        check, value = checks.get(declaration_of(field).path), getattr(config, name)
        if check is not None and value:
            check(value, name_of(name))


def texts_in(value: Any) -> list[str]:
    """Return the texts in a value: itself, the items of a list, or the keys and values of a mapping."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, str)]


def numbers_in(value: Any) -> list[float]:
    """Return the numbers in a value: itself, or the items of a list or mapping."""
    if isinstance(value, Mapping):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]


def part_of(config: Any, config_class: type[C], **more: Any) -> C:
    """Return an instance of ``config_class`` built from the fields of ``config`` declared :func:`same_as` one of its own."""
    values = {}
    for name, field in settings_of(type(config)).items():
        origin = declaration_of(field).origin
        if origin is not None and origin[0] is config_class:
            values[origin[1]] = getattr(config, name)
    return config_class(**{**values, **more})


def changed_of(config: Any, config_class: type) -> list[str]:
    """Return the names of the fields declared :func:`same_as` one of ``config_class`` whose values differ from the default."""
    fields = settings_of(type(config)).items()
    own = {name: field for name, field in fields if (declaration_of(field).origin or (None,))[0] is config_class}
    return [name for name, field in own.items() if getattr(config, name) != default_of(field)]


def recorded(config: Any) -> dict[str, Any]:
    """Return the settings that are stored in the provenance of a program's output."""
    fields = settings_of(type(config)).items()
    return {name: getattr(config, name) for name, field in fields if declaration_of(field).recorded}


def set_by_run(*config_classes: type) -> list[str]:
    """Return the names of the settings that ``spin run`` sets itself."""
    return [
        name
        for config_class in config_classes
        for name, field in settings_of(config_class).items()
        if declaration_of(field).set_by_run
    ]
