"""Options of a run: BasicSR's vocabulary, typed and strict.

Every key is declared once: as a field below, or in the signature of what its ``type:`` names. An unknown key is an
error that names file, place and the nearest valid key; duplicate keys are errors; ``1e-4`` is a number; ranges and
rules across fields are checked on load. ``load_options("x.yml", ["train.optim_g.lr=1e-4"])`` overrides with the same
checks. Files are flat: one file is one run, without inheritance.
"""

import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from archs import ARCHS

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


@dataclass(frozen=True)
class LoaderOptions:
    """How a training set is read; its other keys belong to the data set's constructor."""

    dataset: Component
    batch_size_per_gpu: int = ranged(8, low=1)
    num_worker_per_gpu: int = ranged(1, low=0, high=256)


@dataclass(frozen=True)
class PathOptions:
    """Where a run reads and writes."""

    pretrain_network_g: str | None = None  # weights to start from: a shipped model's name or a file
    experiments: str = "experiments"  # <experiments>/<name>/ holds everything a training run writes


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam or AdamW."""

    type: Literal["Adam", "AdamW"] = "Adam"
    lr: float = ranged(2e-4, low=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = ranged(0.0, low=0)


@dataclass(frozen=True)
class SchedulerOptions:
    """Learning rate over time; `restore.training.learning_rate` is the formula."""

    type: Literal["CosineAnnealingRestartLR", "MultiStepLR", "Constant"] = "Constant"
    periods: tuple[int, ...] = ()
    restart_weights: tuple[float, ...] = ()
    eta_min: float = ranged(0.0, low=0)
    milestones: tuple[int, ...] = ()
    gamma: float = ranged(0.5, low=0)

    def __post_init__(self) -> None:
        if self.type == "CosineAnnealingRestartLR":
            if not self.periods:
                raise OptionError("periods: CosineAnnealingRestartLR needs at least one period, e.g. [100000]")
            if self.restart_weights and len(self.restart_weights) != len(self.periods):
                raise OptionError(
                    f"restart_weights: {len(self.restart_weights)} values for {len(self.periods)} periods; "
                    "give one a period"
                )


@dataclass(frozen=True)
class TrainOptions:
    """The training loop."""

    total_iter: int = ranged(low=1)
    optim_g: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    warmup_iter: int = ranged(-1, low=-1)
    ema_decay: float = ranged(0.0, low=0, high=0.999999)
    pixel_opt: Component = Component("CharbonnierLoss")
    grad_clip: float | None = ranged(None, low=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True


@dataclass(frozen=True)
class ValOptions:
    """Validation: during training every ``val_freq`` iterations; on every set of ``datasets`` but ``train``."""

    val_freq: int | None = ranged(None, low=1)
    window: int = ranged(4, low=1)
    tile: int | None = ranged(None, low=8)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    save_img: bool = False


@dataclass(frozen=True)
class LoggerOptions:
    """What a run tells, and how often it saves."""

    print_freq: int = ranged(100, low=1)
    save_checkpoint_freq: int = ranged(1000, low=1)
    keep_checkpoints: int = ranged(3, low=2)  # newest training states kept; two, so that a damaged one has a fallback


@dataclass(frozen=True)
class Options:
    """One run, from one file."""

    name: str
    network_g: Component | None = None
    scale: int = ranged(4, low=1)
    manual_seed: int = ranged(0, low=0)
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    num_threads: int | None = ranged(None, low=1)  # of the CPU; none: all
    datasets: Mapping[str, Any] = field(default_factory=dict)
    path: PathOptions = PathOptions()
    train: TrainOptions | None = None
    val: ValOptions = ValOptions()
    logger: LoggerOptions = LoggerOptions()
    networks: tuple[str, ...] = ()  # test.py: shipped names or files to score
    baseline: bool = True  # test.py: score bicubic + average beside them

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise OptionError(f"name: {self.name!r} becomes a folder; use letters, digits, '.', '_' and '-'")
        if self.network_g is not None:
            check_arguments(ARCHS, self.network_g, "network_g")

    @property
    def train_set(self) -> LoaderOptions:
        """The section datasets.train; `OptionError` if there is none."""
        section = self.datasets.get("train")
        if section is None:
            raise OptionError("datasets: training needs a section 'train'")
        return section

    @property
    def test_sets(self) -> dict[str, Component]:
        """Every section of datasets but train."""
        return {name: section for name, section in self.datasets.items() if name != "train"}


def load_options(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Options:
    """Read, override and check an options file; `OptionError` names file, place, rule and way out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.name for file in Path("options").glob("*.yml"))) or "none here"
        raise OptionError(f"{path}: cannot be read ({error.__class__.__name__}); files in options/: {known}") from error
    try:
        tree = yaml.load(text, _StrictLoader)
        if not isinstance(tree, dict):
            raise OptionError("an options file is a mapping such as 'name: ...'")
        for override in overrides:
            _override(tree, override)
        return _parse(Options, tree, "")
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error


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
    if isinstance(options, LoaderOptions):  # the data set's keys stand beside the loader's, as in the file
        mine = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "dataset"}
        return {**as_dict(options.dataset), **as_dict(mine)}
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        return {f.name: as_dict(getattr(options, f.name)) for f in dataclasses.fields(options)}
    if isinstance(options, Mapping):
        return {key: as_dict(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [as_dict(value) for value in options]
    return options


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` from YAML as an instance of the annotation ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse(next(a for a in arguments if a is not type(None)), value, where)
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
        return _parse_datasets(value, where)
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
    for key in value:
        if key not in fields:
            place = f"{where}: " if where else ""
            raise OptionError(f"{place}unknown key {key!r}{_nearest(str(key), fields)}")
    arguments = {}
    for name, declared in fields.items():
        place = f"{where}.{name}" if where else name
        if name in value:
            arguments[name] = _parse(hints[name], value[name], place)
            _check_range(arguments[name], declared.metadata, place)
        elif declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
            raise OptionError(f"{place}: is required and missing")
    try:
        return kind(**arguments)
    except OptionError as error:
        raise OptionError(f"{where}.{error}" if where else str(error)) from error


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
    return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _parse_datasets(value: Any, where: str) -> dict[str, Any]:
    """``train`` with its loader's keys taken apart, every other section a plain component."""
    if not isinstance(value, dict):
        raise OptionError(f"{where}: expected sections such as 'train:', not {value!r}")
    sections: dict[str, Any] = {}
    loader_keys = {f.name for f in dataclasses.fields(LoaderOptions)} - {"dataset"}
    for name, section in value.items():
        place = f"{where}.{name}"
        if name == "train" and isinstance(section, dict):
            mine = {key: item for key, item in section.items() if key in loader_keys}
            rest = {key: item for key, item in section.items() if key not in loader_keys}
            sections[name] = _parse_dataclass(LoaderOptions, {**mine, "dataset": rest}, place)
        else:
            sections[name] = _component(section, place)
    return sections


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


def _override(tree: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b.c=value``; the value is read as YAML."""
    place, equals, text = assignment.partition("=")
    if not equals or not place:
        raise OptionError(f"--set {assignment}: expected key=value such as train.optim_g.lr=1e-4")
    *parents, last = place.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise OptionError(f"--set {assignment}: {key!r} is not a section")
    tree[last] = yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """YAML whose numbers are numbers (1e-4) and whose keys are unique."""


def _unique_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise OptionError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
