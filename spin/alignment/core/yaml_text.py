"""YAML as this project reads it: a strict subset, in which nothing is guessed, lost or unbounded.

- A key is the text that is written in the file, and occurs once.
- Plain scalars are text, true or false, empty, or decimal numbers. A number remembers how it was written, so that a folder
  named ``1.10`` stays ``1.10`` where text is wanted. Dates and numbers in other bases are text: ``007`` names a folder.
- Size and depth are bounded: an alias bomb is refused before it is expanded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml

# Far beyond any configuration, far below what exhausts memory or the interpreter's stack.
MAX_VALUES = 100_000
MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"


class _Written:
    """What :class:`WrittenInt` and :class:`WrittenFloat` share: the text of a number as it is written in the file."""

    text: str

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text,)


class WrittenInt(_Written, int):
    """A whole number whose text differs from ``str(number)``, such as ``1_000``."""

    def __new__(cls, text: str) -> WrittenInt:
        number = super().__new__(cls, text.replace("_", ""))
        number.text = text
        return number


class WrittenFloat(_Written, float):
    """A number whose text differs from ``str(number)``, such as ``1.10`` or ``1.0e-7``."""

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, _python_float(text))
        number.text = text
        return number


def _python_float(text: str) -> str:
    sign, body = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    return sign + {".inf": "inf", ".nan": "nan"}.get(body.lower(), body.replace("_", ""))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the base class is untyped)

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Counted while reading: PyYAML takes seconds for thousands of open brackets.
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"line {self.line + 1}: it is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


_RESOLVERS: dict[str, tuple[str, str]] = {
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(
        _TAG + _name, re.compile(f"^(?:{_pattern})$"), ["" if letter == "\0" else letter for letter in _first]
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = str(loader.construct_scalar(node))
    try:
        number = WrittenInt(text)
    except ValueError:
        return text  # more digits than Python converts: a setting that wants a number refuses the text
    return int(number) if str(int(number)) == text else number


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    number = WrittenFloat(text)
    return float(number) if str(float(number)) == text else number


_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


def _represent(dumper: yaml.SafeDumper, number: Any) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + ("int" if isinstance(number, int) else "float"), number.text)


# Written back as it was read: `spin run` hands settings on to its programs in YAML files.
yaml.SafeDumper.add_representer(WrittenInt, _represent)
yaml.SafeDumper.add_representer(WrittenFloat, _represent)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: the text is not YAML, or breaks a rule above; the message is a short phrase without a line break that
            names the line.
    """
    return _parsed(text, lambda loader, node: loader.construct_document(node))


def key_lines(text: str) -> dict[str, int]:
    """Return the line (from 1) of every key of a YAML document, by dotted key.

    Raises:
        ValueError: as :func:`parse_yaml`.
    """
    return _parsed(text, lambda _, node: _lines_of(node, "")) or {}


def _parsed(text: str, result_of: Callable[[yaml.SafeLoader, yaml.Node], Any]) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check().values(node, 0)
        return result_of(loader, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{' '.join(str(error.problem or error.context).split())}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _lines_of(node: yaml.Node, prefix: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[prefix + key.value] = key.start_mark.line + 1
                lines |= _lines_of(value, f"{prefix}{key.value}.")
    return lines


class _Check:
    """The checks of a parsed document before any value is constructed."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, int]] = {}

    def values(self, node: yaml.Node, depth: int) -> tuple[int, int]:
        """Return the number of values in a node with all of its aliases expanded, and the number of levels.

        Raises:
            ValueError: too many or too deep, a key that is repeated or not text, a value of an unknown type.
        """
        total, levels = self.known.get(id(node), (1, 1))
        if depth + levels > MAX_DEPTH:  # an alias to its own parent ends here too
            raise ValueError(f"line {_line(node)}: it is nested deeper than {MAX_DEPTH} levels")
        if id(node) in self.known:
            return total, levels
        if node.tag.removeprefix(_TAG) not in _types_of(node):
            raise ValueError(f"line {_line(node)}: values of the type '{node.tag}' are not supported here")
        if isinstance(node, yaml.MappingNode):
            self.keys(node)
        elif isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        for child in _children(node):
            inside, below = self.values(child, depth + 1)
            total, levels = total + inside, max(levels, below + 1)
            if total > MAX_VALUES:
                raise ValueError(f"line {_line(node)}: its aliases expand to more than {MAX_VALUES} values")
        self.known[id(node)] = total, levels
        return total, levels

    def keys(self, node: yaml.MappingNode) -> None:
        """Check that every key of a mapping is text and occurs once."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _TAG + "null":
                raise ValueError(f"line {_line(key)}: a key must be text, such as 'beta: 0.1'")
            if key.value in seen:
                first, again = seen[key.value], _line(key)
                places = f"twice on line {again}" if first == again else f"on line {first} and on line {again}"
                raise ValueError(f"the key '{key.value}' occurs {places}")
            if key.tag != _TAG + "merge":
                seen[key.value] = _line(key)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _types_of(node: yaml.Node) -> tuple[str, ...]:
    """Return the types that a node may have; a scalar may not be tagged as a mapping, and so on."""
    if isinstance(node, yaml.MappingNode):
        return ("map",)
    return ("seq",) if isinstance(node, yaml.SequenceNode) else ("str", "int", "float", "bool", "null")


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Check that a value tagged as a number or as true or false is one: ``!!int foo`` is not."""
    text, kind = str(node.value), node.tag.removeprefix(_TAG)
    try:
        if kind in ("int", "float"):
            # The beginning of a number that is too long for Python's conversion tells as much.
            (WrittenInt if kind == "int" else WrittenFloat)(text[:50] if text.lstrip("+-").isdecimal() else text)
        elif kind == "bool" and text.lower() not in yaml.SafeLoader.bool_values:
            raise ValueError
    except ValueError:
        raise ValueError(f"line {_line(node)}: {text[:40]!r} is not of the type {kind}") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
