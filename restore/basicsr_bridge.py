"""Our networks and data sets inside an installed BasicSR, built by name by its own scripts.

    python -m restore.basicsr_bridge train -opt options/basicsr/stdan.yml     its options, --launcher, --auto_resume ...
    python -m restore.basicsr_bridge test -opt FILE

or two lines in a training script of one's own, before BasicSR builds anything:

    from restore.basicsr_bridge import register
    register()

Networks go by their names in `archs.ARCHS` (``type: stdan``), training sets by those in `restore.data.DATASETS` with
Restore before them (``type: RestoreVimeo90K``), test sets by those in `restore.test_sets.TEST_SETS` with RestoreTest_
before them (``type: RestoreTest_vid4``). All take the keys they take here, beside those of BasicSR's loader; any other
key is an error. Whole sequences go in and out, so ``model_type: VideoRecurrentModel`` fits. With ``num_gpu: 0`` it
trains on a CPU, but BasicSR 1.4.2 can validate and test video on a GPU only: leave ``val`` out then.

BasicSR numbers samples 0 .. len - 1, again in every epoch and in every round of ``dataset_enlarge_ratio``. Here the
sample is the one of that number plus a random number from the process's torch generator, which BasicSR seeds with
``manual_seed`` plus rank, and torch's loader for each epoch and worker anew. So crops do not repeat, and with the same
``manual_seed``, ``num_worker_per_gpu`` and number of ranks they come again in another run (not exactly with
``prefetch_mode: cpu`` and no worker: a thread then shares the generator with the network).

Of the weights that BasicSR saves only the options know the network. To restore with them here:

    network = ARCHS["stdan"](channels=64)  # as network_g says
    network.load_state_dict(torch.load("net_g_latest.pth", weights_only=True)["params"])  # or params_ema
    save_network("mine.safetensors", network, {"type": "stdan", "channels": 64})

The released BasicSR 1.4.2 cannot be imported beside torchvision 0.17 or newer; its newest source can.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from archs import ARCHS, VideoNet
from restore import distributed
from restore.clip_sources import TrainingClip
from restore.data import DATASETS
from restore.protocol import Window
from restore.samples import APART
from restore.schema import REST, Component, OptionError, construct, parse, ranged
from restore.test_sets import TEST_SETS

TRAIN, TEST = "Restore", "RestoreTest_"  # before the names of data sets; BasicSR's own end in Dataset
INSTALL = (
    "install a torchvision that fits torch, then its newest source: "
    "pip install --no-build-isolation git+https://github.com/XPixelGroup/BasicSR"
)


def register() -> None:
    """Add every network and data set to BasicSR's registries; again it does nothing.

    ValueError where BasicSR is missing or cannot be imported, or where something else has one of the names.
    """
    registries = _basicsr("basicsr.utils.registry")
    data_sets = [_data_set(TRAIN + name, partial(TrainingCrops, name)) for name in DATASETS]
    data_sets += [_data_set(TEST + name, partial(ProtocolWindows, name)) for name in TEST_SETS]
    entries: list[tuple[Any, Callable[..., Any]]] = [(registries.ARCH_REGISTRY, _network(name)) for name in ARCHS]
    entries += [(registries.DATASET_REGISTRY, data_set) for data_set in data_sets]
    new = [(registry, entry) for registry, entry in entries if not _is_ours(registry, entry.__name__)]
    for registry, entry in new:
        registry.register(entry)


def _basicsr(module: str) -> Any:
    """A module of BasicSR, with everything of its own registered."""
    try:
        importlib.import_module("basicsr")
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        missing = isinstance(error, ModuleNotFoundError) and error.name == "basicsr"
        fault = "is not installed" if missing else f"cannot be imported ({' '.join(str(error).split())})"
        raise ValueError(f"basicsr {fault}: {INSTALL}") from error


def _is_ours(registry: Any, name: str) -> bool:
    """Whether the name is taken by us; ValueError where it is by another."""
    if name not in registry:
        return False
    owner = getattr(registry.get(name), "__module__", "something else")
    if owner != __name__:
        raise ValueError(f"BasicSR already knows {name!r}, from {owner}: rename that one")
    return True


def _network(name: str) -> Callable[..., VideoNet]:
    """What BasicSR calls with the keys of ``network_g``."""

    def network(**arguments: Any) -> VideoNet:
        return construct(ARCHS, parse(Component, {**arguments, "type": name}, "network_g"), "network_g")

    network.__name__ = name
    return network


def _data_set(name: str, build: Callable[[Mapping[str, Any]], Dataset[Any]]) -> Callable[..., Dataset[Any]]:
    """What BasicSR calls with the section of a data set."""

    def data_set(opt: Mapping[str, Any]) -> Dataset[Any]:
        return build(opt)

    data_set.__name__ = name
    return data_set


@dataclass(frozen=True)
class LoaderKeys:
    """The keys of a data set that BasicSR itself reads; all others belong to the data set's constructor."""

    data: Component = field(metadata=REST)
    name: str = ""
    phase: Literal["train", "val", "test"] = "train"  # set by BasicSR
    io_backend: Component | None = None
    num_worker_per_gpu: int = ranged(0, low=0)
    batch_size_per_gpu: int = ranged(1, low=1)
    dataset_enlarge_ratio: float = ranged(1.0, low=0)
    use_shuffle: bool = True
    prefetch_mode: Literal["cpu", "cuda"] | None = None
    num_prefetch_queue: int = ranged(1, low=1)
    pin_memory: bool = False
    persistent_workers: bool = False

    def __post_init__(self) -> None:
        if self.io_backend and self.io_backend.type not in ("disk", "lmdb"):
            raise OptionError(f"io_backend: {self.io_backend.type!r} is neither disk nor lmdb")


def loader_keys(name: str, opt: Mapping[str, Any]) -> LoaderKeys:
    """A data set's section, told apart; ``name`` is that of `DATASETS` or `TEST_SETS`.

    What is at ``dataroot_gt`` says whether it is a tree or a database; ``io_backend`` need not. OptionError for values
    that are not what BasicSR's keys say and for a set in the wrong phase.
    """
    keys: LoaderKeys = parse(LoaderKeys, {**opt, "type": name}, _place(opt))
    prefix, table = (TRAIN, DATASETS) if keys.phase == "train" else (TEST, TEST_SETS)
    if name not in table:
        fit = ", ".join(prefix + other for other in table)
        raise OptionError(f"{_place(opt)}.type: {opt['type']} is not for phase {keys.phase!r}; there are {fit}")
    return keys


def _place(opt: Mapping[str, Any]) -> str:
    """Where the section stands, for messages."""
    return f"datasets.{opt.get('phase', 'train')}"


class TrainingSample(TypedDict):
    """Input (T, 3, h, w) and truth (U, 3, H, W), float RGB in [0, 1], and where they are from."""

    lq: Tensor
    gt: Tensor
    key: str


class TrainingCrops(Dataset[TrainingSample]):
    """The training set ``name`` of `DATASETS` as BasicSR reads one; ``opt`` is its section of BasicSR's options.

    OptionError for keys that neither BasicSR's loader nor the set knows, for what the set refuses, and where an epoch
    is shorter than a batch, with which BasicSR would end at once.
    """

    def __init__(self, name: str, opt: Mapping[str, Any]) -> None:
        keys = loader_keys(name, opt)
        self.opt = opt
        self.samples = construct(DATASETS, keys.data, _place(opt))
        batch = keys.batch_size_per_gpu * distributed.world_size()
        if len(self) * keys.dataset_enlarge_ratio < batch:
            raise OptionError(
                f"{_place(opt)}.dataset_enlarge_ratio: {len(self)} stretches of frames make no batch of {batch}; "
                f"set at least {math.ceil(batch / len(self))}, better 100 times that"
            )

    def __len__(self) -> int:
        """The number of different stretches of frames."""
        return len(self.samples)

    def __getitem__(self, index: int) -> TrainingSample:
        """A new sample every time; see the module."""
        sample = self.samples[(index + int(torch.randint(APART, ()))) % APART]
        return {"lq": sample["lq"], "gt": sample["gt"], "key": sample["name"]}


@dataclass(frozen=True)
class WindowKeys:
    """The keys of a test set here; all others are those of the set in `TEST_SETS`."""

    test_set: Component = field(metadata=REST)
    multiple_of: int = ranged(8, low=1)


class WindowSample(TypedDict):
    """Input (T, 3, h, w) and truth (U, 3, H, W) of a window, float RGB in [0, 1], and its name."""

    lq: Tensor
    gt: Tensor
    folder: str
    lq_path: str


class ProtocolWindows(Dataset[WindowSample]):
    """The test set ``name`` of `TEST_SETS` as BasicSR's VideoRecurrentModel reads one, window by window.

    BasicSR does not pad, so input frames are cut to ``multiple_of`` pixels (a network's own; 8 for STDAN), and a frame
    counts once for each window that has it: figures to watch a training by. ``python test.py`` gives those to publish.
    OptionError as for training sets.
    """

    def __init__(self, name: str, opt: Mapping[str, Any]) -> None:
        keys: WindowKeys = parse(WindowKeys, loader_keys(name, opt).data.describe(), _place(opt))
        test_set = construct(TEST_SETS, keys.test_set, _place(opt))
        if test_set.left_out:
            raise OptionError(f"{_place(opt)}: {'; '.join(test_set.left_out.values())}")
        self.opt, self.multiple, self.protocol = opt, keys.multiple_of, test_set.protocol
        self.windows = [(clip, window) for clip in test_set.found for window in self._windows(clip)]
        # BasicSR counts the results of a folder by how often its name stands here
        self.data_info = {"folder": [_name(*place) for place in self.windows for _ in place[1].frames]}

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.windows)

    def __getitem__(self, number: int) -> WindowSample:
        """A window and its input. Raises SampleError where a file cannot be read."""
        clip, window = self.windows[number]
        gt = self.protocol.truth(clip, window.frames)
        lq = self.protocol.inputs(clip, window, gt)
        name, scale = _name(clip, window), self.protocol.scale
        lq, gt = _cut(lq, self.multiple), _cut(gt, scale * self.multiple)
        return {"lq": lq, "gt": gt, "folder": name, "lq_path": name}

    def _windows(self, clip: TrainingClip) -> list[Window]:
        try:
            return self.protocol.windows(clip.count)
        except ValueError as error:
            raise OptionError(f"{_place(self.opt)}: {clip.name}: {error}") from error


def _name(clip: TrainingClip, window: Window) -> str:
    return f"{clip.name}_{window.start:08d}"


def _cut(frames: Float[Tensor, "t 3 h w"], multiple: int) -> Float[Tensor, "t 3 _ _"]:
    """Less at the bottom and the right, to multiples of ``multiple``."""
    height, width = (extent // multiple * multiple for extent in frames.shape[2:])
    return frames[..., :height, :width].contiguous()


def main(argv: Sequence[str] | None = None) -> int:
    """Register, then run BasicSR's train_pipeline or test_pipeline below the current folder."""
    parser = argparse.ArgumentParser(prog="python -m restore.basicsr_bridge", description="Run BasicSR's own scripts.")
    parser.add_argument("command", choices=["train", "test"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="BasicSR's, e.g. -opt options/basicsr/stdan.yml")
    given = parser.parse_args(argv)
    try:
        register()
        script = _basicsr(f"basicsr.{given.command}")
    except ValueError as error:
        return _complain(error)
    sys.argv[1:] = given.arguments  # BasicSR reads them there
    try:
        getattr(script, f"{given.command}_pipeline")(str(Path.cwd()))
    except OptionError as error:  # any other error is BasicSR's, which needs its traceback
        return _complain(error)
    return 0


def _complain(error: ValueError) -> int:
    """One line on stderr and the exit code."""
    print(f"restore.basicsr_bridge: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
