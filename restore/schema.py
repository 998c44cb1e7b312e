"""How options are read: dataclasses and signatures as the schema of strict YAML.

Numbers are numbers (1e-4), keys are unique, and every key is declared: as a field of a dataclass, or in the signature
of what a section's ``type:`` names. Errors name the place, the rule and the nearest valid key.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


class OptionError(ValueError):
    """A bad option; the message names the file, the place in it, the rule and the way out."""


@dataclass(frozen=True)
class Component:
    """A section with ``type:``: a name from one of the tables and the arguments of its constructor."""

    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """``{"type": ..., **arguments}``, as in the file."""
        return {"type": self.type, **self.arguments}


def ranged(default: Any = dataclasses.MISSING, *, low: float | None = None, high: float | None = None) -> Any:
    """A number within [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})

REST = {"rest": True}  # metadata of the field that takes the keys of its section that no other field has


def construct(table: Mapping[str, Callable[..., T]], section: Component, where: str) -> T:
    """Call the entry of ``table`` that ``section`` names with its arguments, checked against the signature."""
    check_arguments(table, section, where)
    try:
        return table[section.type](**section.arguments)
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error


def check_arguments(table: Mapping[str, Callable[..., Any]], section: Component, where: str) -> None:
    """Raise `OptionError` for a type that is not in the table or arguments that its signature does not take."""
    if section.type not in table:
        raise OptionError(f"{where}.type: unknown type {section.type!r}{_nearest(section.type, table)}")
    parameters = inspect.signature(table[section.type]).parameters
    for key in section.arguments:
        if key not in parameters:
            raise OptionError(f"{where}: unknown key {key!r} for {section.type}{_nearest(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in section.arguments:
            raise OptionError(f"{where}: {section.type} needs the key {key!r}")


def as_dict(options: Any) -> Any:
    """The resolved options as plain mappings and lists, for writing beside weights and comparing runs."""
    if isinstance(options, Component):
        return {key: as_dict(value) for key, value in options.describe().items()}
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        tree: dict[str, Any] = {}
        for f in dataclasses.fields(options):
            value = as_dict(getattr(options, f.name))
            tree.update(value if f.metadata.get("rest") else {f.name: value})  # as in the file: beside the others
        return tree
    if isinstance(options, Mapping):
        return {key: as_dict(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [as_dict(value) for value in options]
    return options


def parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` from YAML as an instance of the annotation ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return parse(next(a for a in arguments if a is not type(None)), value, where)
    if kind is Component:
        return _component(value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise OptionError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _parse_sections(arguments[1], value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 5e3 is a number of iterations, too
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{where}: {value!r} is not {_KIND_NAMES.get(kind, kind.__name__)}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise OptionError(f"{where}: expected a section with keys, not {value!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    value = _with_rest(value, fields)
    for key in value:
        if key not in fields:
            place = f"{where}: " if where else ""
            raise OptionError(f"{place}unknown key {key!r}{_nearest(str(key), fields)}")
    arguments = {}
    for name, declared in fields.items():
        place = where if declared.metadata.get("rest") else f"{where}.{name}" if where else name
        if name in value:
            arguments[name] = parse(hints[name], value[name], place)
            _check_range(arguments[name], declared.metadata, place)
        elif declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
            raise OptionError(f"{place}: is required and missing")
    try:
        return kind(**arguments)
    except OptionError as error:
        raise OptionError(f"{where}.{error}" if where else str(error)) from error


def _with_rest(value: dict[Any, Any], fields: Mapping[str, dataclasses.Field[Any]]) -> dict[Any, Any]:
    """Keys that no field has, moved into the field that takes the rest, if there is one."""
    for name, declared in fields.items():
        if declared.metadata.get("rest"):
            left = {key: item for key, item in value.items() if key == name or key not in fields}
            return {**{key: item for key, item in value.items() if key not in left}, name: left}
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high = metadata.get("low"), metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"within {low}..{high}"
        raise OptionError(f"{where}: {value} must be {rule}")


def _parse_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise OptionError(f"{where}: expected a list, not {value!r}")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise OptionError(f"{where}: expected {len(arguments)} values, not {len(value)}")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    return tuple(parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _parse_sections(kind: Any, value: Any, where: str) -> dict[str, Any]:
    """A mapping from free names to sections of one kind."""
    if not isinstance(value, dict):
        raise OptionError(f"{where}: expected sections with names of their own, not {value!r}")
    return {name: parse(kind, section, f"{where}.{name}") for name, section in value.items()}


def _component(value: Any, where: str) -> Component:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise OptionError(f"{where}: expected a section with the key 'type'")
    return Component(value["type"], {key: _tuples(item) for key, item in value.items() if key != "type"})


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that constructors get what their signatures say."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _nearest(word: str, known: Any) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def override(tree: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b.c=value``; the value is read as YAML."""
    place, equals, text = assignment.partition("=")
    if not equals or not place:
        raise OptionError(f"--set {assignment}: expected key=value such as train.optim_g.lr=1e-4")
    *parents, last = place.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise OptionError(f"--set {assignment}: {key!r} is not a section")
    tree[last] = yaml.load(text, StrictLoader)


class StrictLoader(yaml.SafeLoader):
    """YAML whose numbers are numbers (1e-4) and whose keys are unique."""


def _unique_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise OptionError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
