"""Settings declared once: a dataclass field with its type, default, range and sentence.

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
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from spin.alignment.core.config import convert
from spin.alignment.core.errors import InputError

C = TypeVar("C")
_KEY = "setting"


@dataclass(frozen=True)
class Declaration:
    """What a field says of itself beside its type and default.

    Attributes:
        help: one sentence or fragment; the only documentation of the setting.
        group: heading under which help and docs list this field and those after it, up to the next heading.
        ge, gt, le, lt: the range of a number, or of every number of a list. Numbers are always finite.
        unset: what the default ``None`` stands for, such as "the model's context".
        set_by_run: ``spin run`` decides the value itself, so no section of its configuration may hold the key.
        recorded: True: the value stands in the provenance of what the program writes. False: it changes no result, so a
            training that differs in it alone is the same one.
        origin: the class and field of which :func:`same_as` made this one.
    """

    help: str
    group: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    unset: str = ""
    set_by_run: bool = False
    recorded: bool | None = None
    origin: tuple[type, str] | None = None

    def allows(self, value: float) -> bool:
        """Return whether a number is finite and in the range."""
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def range(self) -> str:
        """Return the range in words: ``0 or more``, ``above 0 and at most 1``."""
        bounds = []
        if self.ge is not None:
            bounds.append(f"{self.ge:g} or more")
        if self.gt is not None:
            bounds.append(f"a number above {self.gt:g}")
        if self.le is not None:
            bounds.append(f"at most {self.le:g}")
        if self.lt is not None:
            bounds.append(f"below {self.lt:g}")
        return " and ".join(bounds) or "a finite number"


def setting(default: Any = MISSING, help: str = "", **facts: Any) -> Any:
    """Declare a field of a settings dataclass; without a default it must be given. See :class:`Declaration` for the facts.

    A list or mapping as default is copied for each instance.
    """
    return _field(default, Declaration(help, **facts))


def same_as(config_class: type, name: str, default: Any = MISSING, **facts: Any) -> Any:
    """Declare a field as another class does, the facts given here aside; :func:`part_of` finds its way back.

    The group and who sets the value (``set_by_run``, ``recorded``) are not taken over.
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
    """Return what a field says of itself; of a field that another library declares, its help text."""
    return field.metadata.get(_KEY) or Declaration(str(field.metadata.get("help", "")))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; ``MISSING`` where a value must be given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def settings_of(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a class that were declared with :func:`setting` or :func:`same_as`, by name, in order."""
    fields = dataclasses.fields(config_class)
    return {field.name: field for field in fields if field.init and _KEY in field.metadata}


def grouped(config_class: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the settings of a class under their headings, in order."""
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

    Values of a like type (a path for a text, a tuple for a list) are converted in place. ``name_of`` gives the name under
    which a user knows a field.

    Raises:
        InputError: naming the setting, its value and what it may be.
    """
    hints = hints_of(type(config))
    for name, field in settings_of(type(config)).items():
        value = checked_value(field, hints[name], getattr(config, name), name_of(name))
        object.__setattr__(config, name, value)  # a frozen class as well


def checked_value(field: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
    """Return a value converted to the type of its field; ``where`` names it in errors.

    Raises:
        InputError: another type, an unknown choice, a number that is not finite or out of range.
    """
    value = convert(value, hint, where)
    declaration = declaration_of(field)
    for number in numbers_in(value) if _KEY in field.metadata else ():
        if not declaration.allows(number):
            raise InputError(f"{where} is {number}: set it to {declaration.range()}")
    return value


def numbers_in(value: Any) -> list[float]:
    """Return the numbers that a value is or holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]


def part_of(config: Any, config_class: type[C], **more: Any) -> C:
    """Return an instance of ``config_class`` made of those fields of ``config`` that are declared :func:`same_as` its own."""
    values = {}
    for name, field in settings_of(type(config)).items():
        origin = declaration_of(field).origin
        if origin is not None and origin[0] is config_class:
            values[origin[1]] = getattr(config, name)
    return config_class(**{**values, **more})


def changed_of(config: Any, config_class: type) -> list[str]:
    """Return the names of the fields that are declared :func:`same_as` one of ``config_class`` and differ from their default."""
    fields = settings_of(type(config)).items()
    own = {name: field for name, field in fields if (declaration_of(field).origin or (None,))[0] is config_class}
    return [name for name, field in own.items() if getattr(config, name) != default_of(field)]


def recorded(config: Any) -> dict[str, Any]:
    """Return the settings that belong in the provenance of what a program writes."""
    fields = settings_of(type(config)).items()
    return {name: getattr(config, name) for name, field in fields if declaration_of(field).recorded}


def set_by_run(*config_classes: type) -> list[str]:
    """Return the settings whose values ``spin run`` decides itself."""
    return [
        name
        for config_class in config_classes
        for name, field in settings_of(config_class).items()
        if declaration_of(field).set_by_run
    ]
