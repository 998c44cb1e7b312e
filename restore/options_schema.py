"""Options as a JSON Schema, so that an editor completes, explains and checks them.

    python -m restore.options_schema            writes options/schema.json
    python -m restore.options_schema --check    exits with 1 where it is out of date

Nothing is said twice: keys, types, ranges and defaults are those of the dataclasses in `restore.options` and of the
constructors' signatures in the tables; descriptions are their comments and docstrings. Draft 7, since every YAML
language server knows it. Rules across keys are those of `load_options` alone.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from archs import ARCHS, CLASSIFIERS
from restore.action_sets import ACTION_SETS, ACTION_TEST_SETS
from restore.checkpoint import replacing
from restore.data import DATASETS
from restore.degrade_video import DEGRADATIONS
from restore.losses import LABEL_LOSSES, LOSSES
from restore.metric_table import METRICS
from restore.options import LoaderOptions, LossOptions, Options
from restore.test_sets import TEST_SETS

FILE = Path(__file__).parents[1] / "options" / "schema.json"

Schema = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of section with ``type``: the table of types, and the dataclass of the keys beside their own."""

    table: Mapping[str, Callable[..., Any]]
    beside: type | None = None
    without: Sequence[str] = ()  # keys of the constructors that the section does not take


@dataclass(frozen=True)
class MixedSet:
    """What a set of `restore.data.Mixed` takes beside its own keys."""

    weight: float = 1.0  # how often a sample is of this set, relative to the others


KINDS = {
    "network": Kind({**ARCHS, **CLASSIFIERS}),
    "training_set": Kind({**DATASETS, **ACTION_SETS}, LoaderOptions),
    "mixed_set": Kind({name: kind for name, kind in DATASETS.items() if name != "Mixed"}, MixedSet),
    "test_set": Kind({**TEST_SETS, **ACTION_TEST_SETS}, LoaderOptions),
    "loss": Kind({**LOSSES, **LABEL_LOSSES}, LossOptions),
    "metric": Kind(METRICS),
    "degradation": Kind(DEGRADATIONS, without=["scale"]),
}
PLACES = {  # of sections with type, by their key or, for those with free names, by the key of what holds them
    "network_g": "network",
    "pixel_opt": "loss",
    "losses": "loss",
    "metrics": "metric",
    "degradation": "degradation",
    "sets": "mixed_set",
}


def json_schema() -> Schema:
    """The schema of an options file."""
    schema = _section(Options)
    train, test = ({"$ref": f"#/definitions/{kind}"} for kind in ("training_set", "test_set"))
    schema["properties"]["datasets"] |= {"properties": {"train": train}, "additionalProperties": test}
    definitions = {name: _typed_section(kind) for name, kind in KINDS.items()}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "definitions": definitions}


def _section(kind: type) -> Schema:
    """A dataclass: its fields are the keys, but for the one that takes the rest."""
    hints = typing.get_type_hints(kind)
    declared = [f for f in dataclasses.fields(kind) if not f.metadata.get("rest")]
    required = [f.name for f in declared if f.default is f.default_factory is dataclasses.MISSING]
    return {
        "description": _first_line(kind),
        "type": "object",
        "properties": {f.name: _key(kind, f.name, hints[f.name], f.default, f.metadata) for f in declared},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _typed_section(kind: Kind) -> Schema:
    """A section whose other keys depend on its ``type``."""
    beside = _section(kind.beside)["properties"] if kind.beside else {}
    return {
        "type": "object",
        "properties": {"type": {"enum": list(kind.table)}},
        "required": ["type"],
        "allOf": [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": _arguments(entry, name, beside, kind.without),
            }
            for name, entry in kind.table.items()
        ],
    }


def _arguments(entry: Callable[..., Any], name: str, beside: Schema, without: Sequence[str]) -> Schema:
    """A constructor: its keywords are the keys."""
    keywords = {key: p for key, p in inspect.signature(entry).parameters.items() if key not in without}
    required = [key for key, keyword in keywords.items() if keyword.default is keyword.empty]
    keys = {key: _key(entry, key, keyword.annotation, keyword.default, {}) for key, keyword in keywords.items()}
    return {
        "description": _first_line(entry),
        "properties": {"type": {"const": name}, **keys, **beside},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _key(owner: Any, name: str, annotation: Any, default: Any, metadata: Mapping[str, Any]) -> Schema:
    """One key: what it means, its type, range and default."""
    said = default is not dataclasses.MISSING and default is not inspect.Parameter.empty
    if annotation is Any and said:
        annotation = type(default)
    schema = _type(annotation, PLACES.get(name, ""))
    schema |= {word: metadata[key] for word, key in (("minimum", "low"), ("maximum", "high")) if _has(metadata, key)}
    if said and not dataclasses.is_dataclass(default):
        schema["default"] = list(default) if isinstance(default, tuple) else default
    meaning = _meaning(owner, name)
    return {"description": meaning, **schema} if meaning else schema


def _has(metadata: Mapping[str, Any], key: str) -> bool:
    return metadata.get(key) is not None


_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _type(kind: Any, place: str = "") -> Schema:
    """An annotation; ``place`` is the kind of section that belongs there, if it is one with ``type``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [_type(argument, place) for argument in arguments if argument is not type(None)]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        return _or_null(schema) if type(None) in arguments else schema
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _type(arguments[0], place)}
    if origin is tuple:
        items = [_type(argument) for argument in arguments]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    if place:
        section = {"$ref": f"#/definitions/{place}"}
        named = origin is not None and arguments[1] is not Any  # several, by names of their own
        return {"type": "object", "additionalProperties": section} if named else section
    if origin is not None:
        return {"type": "object"}
    if dataclasses.is_dataclass(kind):
        return _section(kind)  # type: ignore[arg-type]
    return {"type": _NAMES[kind]} if kind in _NAMES else {}


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str) and schema["type"] != "object":
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _first_line(owner: Any) -> str:
    return (inspect.getdoc(owner) or "").partition("\n")[0]


def _meaning(owner: Any, name: str) -> str:
    """The comment behind a key where it is declared, else the sentence of a docstring that names it."""
    for kind in owner.__mro__ if isinstance(owner, type) else (owner,):
        ours = kind.__module__.partition(".")[0] in ("archs", "restore", "__main__")  # the last: MixedSet, as a command
        found = ours and (_comments(kind).get(name) or next(_sentences(kind, name), ""))
        if found:
            return found
    return ""


@functools.cache
def _comments(kind: Any) -> dict[str, str]:
    """Comments at the ends of lines that declare something, by its name."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
            _, mark, comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
            found.update({node.target.id: comment} if mark else {})
    return found


def _sentences(owner: Any, name: str) -> Iterator[str]:
    """Sentences and list entries of the docstring that name a key as ``key``."""
    text = " ".join((inspect.getdoc(owner) or "").split())
    for sentence in re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])|(?<=\S[.:])\s+- ", text):
        if re.search(rf"``{name}\b", sentence):
            yield sentence


def as_text(value: Any, indent: int = 0) -> str:
    """JSON of which each object and list is one line where that is short."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= 110 or not isinstance(value, (dict, list)) or not value:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {as_text(item, indent + 1)}" for key, item in value.items()]
    else:
        parts = [as_text(item, indent + 1) for item in value]
    pad, (opening, closing) = "\n" + " " * (indent + 1), "{}" if isinstance(value, dict) else "[]"
    return f"{opening}{pad}{f',{pad}'.join(parts)}{pad[:-1]}{closing}"


def main(argv: list[str] | None = None) -> int:
    """Write or check options/schema.json."""
    parser = argparse.ArgumentParser(prog="python -m restore.options_schema", description="The options' JSON Schema.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if options/schema.json is out of date")
    arguments = parser.parse_args(argv)
    text = as_text(json_schema()) + "\n"
    if not arguments.check:
        with replacing(FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
        print(f"{FILE}: out of date; run python -m restore.options_schema", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
