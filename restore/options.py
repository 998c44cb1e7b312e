"""Options of a run: BasicSR's vocabulary, typed and strict.

Every key is declared once: as a field below, or in the signature of what its ``type:`` names. An unknown key is an
error that names file, place and the nearest valid key; duplicate keys are errors; ``1e-4`` is a number; ranges and
rules across fields are checked on load. ``load_options("x.yml", ["train.optim_g.lr=1e-4"])`` overrides with the same
checks. Files are flat: one file is one run, without inheritance.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from archs import ARCHS, CLASSIFIERS
from restore.dialects import summary, translate
from restore.schema import (
    REST,
    Component,
    OptionError,
    StrictLoader,
    as_dict,
    check_arguments,
    construct,
    override,
    parse,
    ranged,
)

__all__ = ["Component", "OptionError", "Options", "as_dict", "check_arguments", "construct", "load_options"]

log = logging.getLogger("restore")


@dataclass(frozen=True)
class LoaderOptions:
    """How a training set is read; its other keys belong to the data set's constructor."""

    dataset: Component = field(metadata=REST)
    batch_size_per_gpu: int = ranged(8, low=1)
    num_worker_per_gpu: int = ranged(1, low=0, high=256)


@dataclass(frozen=True)
class PathOptions:
    """Where a run reads and writes."""

    pretrain_network_g: str | None = None  # weights to start from: a shipped model's name, a file
    pretrain_extractor: str | None = None  # a file: weights of an action network or a ResNet for network_g.extractor
    experiments: str = "experiments"  # <experiments>/<name>/ holds everything a training run writes


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam, AdamW or SGD."""

    type: Literal["Adam", "AdamW", "SGD"] = "Adam"
    lr: float = ranged(2e-4, low=0)
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam and AdamW
    weight_decay: float = ranged(0.0, low=0)
    momentum: float = ranged(0.9, low=0, high=1)  # of SGD
    nesterov: bool = True  # of SGD

    def __post_init__(self) -> None:
        if self.type == "SGD" and self.nesterov and not self.momentum:
            raise OptionError("nesterov: true needs a momentum above 0; set nesterov: false for plain SGD")


@dataclass(frozen=True)
class SchedulerOptions:
    """Learning rate over time; `restore.schedule.learning_rate` is the formula."""

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
class LossOptions:
    """A loss, its other keys being those of its constructor; with ``ramp`` [a, b] its weight rises from 0 at a to b."""

    loss: Component = field(metadata=REST)
    ramp: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.ramp and not 0 <= self.ramp[0] < self.ramp[1]:
            raise OptionError(f"ramp: {list(self.ramp)} does not rise; give two iterations such as [0, 20000]")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose names match a regular expression: their own learning rate, frozen until an iteration."""

    match: str
    lr_mult: float = ranged(1.0, low=0)
    freeze_until: int = ranged(0, low=0)


@dataclass(frozen=True)
class PrivilegedOptions:
    """Training with the truth as an input: a teacher that sees it, then its student (`restore.privileged_training`)."""

    role: Literal["teacher", "student"]
    teacher: str | None = None  # of a student: models/teacher_<n>.safetensors of the teacher's run
    loss_weight: float = ranged(1e-6, low=0)  # of a student: of the distillation; 1e-6 as in PISR
    bottleneck: int = ranged(4, low=1)  # of a teacher: channels through which it sees the truth
    noise: float = ranged(0.1, low=0)  # of a teacher: standard deviation of noise on these, which lie within -1..1

    def __post_init__(self) -> None:
        if self.role == "student" and self.teacher is None:
            raise OptionError("teacher: a student needs its teacher, models/teacher_<n>.safetensors of a teacher's run")
        if self.role == "teacher" and self.teacher is not None:
            raise OptionError("teacher: a teacher has none; role: student learns from one")


@dataclass(frozen=True)
class TrainOptions:
    """The training loop."""

    total_iter: int = ranged(low=1)
    optim_g: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    warmup_iter: int = ranged(-1, low=-1)
    ema_decay: float = ranged(0.0, low=0, high=0.999999)
    pixel_opt: LossOptions | None = None  # BasicSR's name for the first loss
    losses: Mapping[str, LossOptions] = field(default_factory=dict)  # more of them, by a name for the log
    param_groups: tuple[ParamGroup, ...] = ()  # the first that matches counts; what none matches has the base rate
    accum_iter: int = ranged(1, low=1)  # batches a step: gradients add up
    grad_clip: float | None = ranged(None, low=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    activation_checkpointing: bool = False  # recompute the heavy parts in the backward pass: less memory, slower
    privileged: PrivilegedOptions | None = None  # training with the truth as an input, in two runs
    on_nan: Literal["stop", "rollback"] = "stop"  # rollback: back to the last saved state, without that batch

    def __post_init__(self) -> None:
        if not self.terms:
            raise OptionError("pixel_opt: training needs a loss, e.g. pixel_opt: {type: CharbonnierLoss}")

    @property
    def terms(self) -> dict[str, LossOptions]:
        """All losses by name; that of a student of privileged training, too, unless there is one of its name."""
        terms = {"pixel": self.pixel_opt} if self.pixel_opt else {}
        if self.privileged and self.privileged.role == "student":
            arguments = {"name": "privileged", "loss_weight": self.privileged.loss_weight}
            terms["privileged"] = LossOptions(Component("AuxiliaryLoss", arguments))
        return {**terms, **self.losses}


@dataclass(frozen=True)
class ValOptions:
    """Validation: during training every ``val_freq`` iterations; on every set of ``datasets`` but ``train``."""

    val_freq: int | None = ranged(None, low=1)
    tile: int | None = ranged(None, low=8)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    save_img: bool = False
    metrics: Mapping[str, Component] = field(default_factory=dict)  # by a name for the table; none: the protocol's


@dataclass(frozen=True)
class LoggerOptions:
    """What a run tells, and how often it saves."""

    print_freq: int = ranged(100, low=1)
    save_checkpoint_freq: int = ranged(1000, low=1)
    keep_checkpoints: int = ranged(3, low=2)  # newest training states kept; two, so that a damaged one has a fallback
    use_tb_logger: bool = False  # TensorBoard, in tb_logger/<name>


@dataclass(frozen=True)
class Options:
    """One run, from one file."""

    name: str
    network_g: Component | None = None
    scale: int = ranged(4, low=1)
    manual_seed: int = ranged(0, low=0)
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    num_threads: int | None = ranged(None, low=1)  # of the CPU; none: all
    datasets: Mapping[str, LoaderOptions] = field(default_factory=dict)
    find_unused_parameters: bool = False  # for networks that do not use every parameter in every step, with DDP
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
            check_arguments({**ARCHS, **CLASSIFIERS}, self.network_g, "network_g")
        if self.find_unused_parameters and self.train and self.train.privileged:
            raise OptionError(
                "find_unused_parameters: would count what train.privileged adds as unused; remove one of the two"
            )

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
        return {name: section.dataset for name, section in self.datasets.items() if name != "train"}


def load_options(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Options:
    """Read, override and check an options file; `OptionError` names file, place, rule and way out.

    Files and overrides may use the spellings of `restore.dialects`, too; a warning says what they stand for.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.name for file in Path("options").glob("*.yml"))) or "none here"
        raise OptionError(f"{path}: cannot be read ({error.__class__.__name__}); files in options/: {known}") from error
    try:
        tree = yaml.load(text, StrictLoader)
        if not isinstance(tree, dict):
            raise OptionError("an options file is a mapping such as 'name: ...'")
        tree, notes = translate(tree)
        for assignment in overrides:
            override(tree, assignment)
        tree, more = translate(tree, replace=True)
        if notes or more:
            log.warning("%s: %s", path, summary([*notes, *more]))
        return parse(Options, tree, "")
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
