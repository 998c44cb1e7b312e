"""Rules that move, convert and drop keys of a tree of options.

In a place such as ``datasets.*.type`` a ``*`` stands for any key and ``!train`` for any but train.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restore.schema import OptionError

Place = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """``old`` goes to ``new`` as ``convert(value, *values at reads)``.

    Without ``new`` it is dropped, and so is what is null or becomes null on its way to another place: it is not given.
    """

    old: str
    new: str
    convert: Callable[..., Any]
    reads: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Change:
    """What was done with one key; ``new`` is empty where it was dropped, for the reason ``why``."""

    old: str
    new: str
    why: str = ""


def rewrite(tree: dict[str, Any], rules: Sequence[Rule], *, replace: bool = False) -> list[Change]:
    """Apply one rule after the other, in place; what a rule reads may have been put there by those before it.

    `OptionError` where a conversion refuses a value, or, unless ``replace``, another value stands in the new place.
    """
    changes = []
    for rule in rules:
        for place, stars in list(matches(tree, rule.old)):
            changes += _apply(rule, tree, place, stars, replace)
    return changes


def matches(tree: Any, pattern: str, place: Place = (), stars: Place = ()) -> Iterator[tuple[Place, Place]]:
    """The places in the tree that a pattern stands for, each with what its * are."""
    if not pattern:
        yield place, stars
    elif isinstance(tree, dict):
        part, _, rest = pattern.partition(".")
        for key in filter(lambda key: isinstance(key, str), tree):
            if part == key:
                yield from matches(tree[key], rest, (*place, key), stars)
            elif part == "*" or (part[0] == "!" and key != part[1:]):
                yield from matches(tree[key], rest, (*place, key), (*stars, key))


def look(tree: Any, place: Sequence[str]) -> Any:
    """The value at a place, None where there is none."""
    for key in place:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def renamed(places: Mapping[str, str]) -> list[Rule]:
    """Rules that move values as they are."""
    return [Rule(old, new, lambda value: value) for old, new in places.items()]


def dropped(old: str, why: str, *harmless: Any, otherwise: str = "") -> Rule:
    """A rule that drops a key; with ``otherwise`` only if it is null or harmless, other values being that error."""

    def check(value: Any) -> None:
        if otherwise and value not in harmless:
            raise OptionError(f"{value!r} {otherwise}")

    return Rule(old, "", check, why=why)


def _apply(rule: Rule, tree: dict[str, Any], old: Place, stars: Sequence[str], replace: bool) -> list[Change]:
    new, section = _filled(rule.new, stars), look(tree, old[:-1])
    value, others = section[old[-1]], [look(tree, _filled(place, stars)) for place in rule.reads]
    try:
        result = None if value is None and new != old else rule.convert(value, *others)
    except OptionError as error:
        raise OptionError(f"{'.'.join(old)}: {error}") from error
    if new == old and result == value:
        return []
    del section[old[-1]]
    if not new or result is None:
        return [Change(old[-1], "", rule.why or "not given")]
    _put(tree, new, result, ".".join(old), replace)
    if new == old:
        return [Change(f"{old[-1]}: {value}", str(result))]
    return [Change(".".join(old) if old[-1] == new[-1] else old[-1], ".".join(new))]


def _filled(pattern: str, stars: Sequence[str]) -> Place:
    """The place of a pattern, given what each * is."""
    left = iter(stars)
    return tuple(next(left) if part[0] in "*!" else part for part in pattern.split(".") if part)


def _put(tree: dict[str, Any], place: Place, value: Any, old: str, replace: bool) -> None:
    """Set the value at a place; the keys of a section join those that are there. Null is nothing there."""
    *parents, last = place
    section: Any = tree
    for key in parents:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise OptionError(f"{old}: belongs in the section {'.'.join(parents)}, but {key} is {section!r}")
    there = section.get(last)
    if isinstance(value, dict) and isinstance(there, dict):
        for key, item in value.items():
            _put(tree, (*place, key), item, old, replace)
    elif there is not None and there != value and not replace:
        raise OptionError(f"{old}: {'.'.join(place)} is the same option and {there!r}; give one of them")
    else:
        section[last] = value
