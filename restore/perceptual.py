"""Perceptual distances by trained networks: LPIPS, and whatever the package pyiqa has (DISTS, NIQE, TOPIQ ...).

Both packages are optional. Weights are read from disk; LPIPS never looks for them on the internet.
"""

import difflib
import hashlib
import io
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from restore.metrics import as_values, check_pair

# the trunks' files as torchvision names them; the name ends in the first digits of the file's SHA-256
TRUNKS = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
_SMALLEST = 32


class LPIPS:
    """Learned perceptual distance (Zhang et al., "The unreasonable effectiveness of deep features", CVPR 2018).

    Computed by the authors' package `lpips`, version 0.1 of the metric; 0 for identical frames, lower is better.

    Args:
        net: the trunk; alex is what papers report.
        weights: the trunk's file, a state_dict of torchvision's network; None looks in torch's cache (`TRUNKS` has the
            names).

    Raises:
        ValueError: package or file is missing, or the file is another network's.
    """

    unit, higher_is_better, digits, frames = "", False, 4, 1

    def __init__(self, *, net: Literal["alex", "vgg", "squeeze"] = "alex", weights: str | None = None) -> None:
        if net not in TRUNKS:
            raise ValueError(f"net={net!r} is none of {', '.join(TRUNKS)}")
        package = _package("lpips", "LPIPS")
        path = _trunk_file(net, weights)
        self.label = f"LPIPS ({net})"
        content = path.read_bytes()
        self.protocol = f"LPIPS 0.1, {net} trunk {path.name}{_origin(content, net)}, of 8-bit RGB scaled to -1..1"
        # The random trunk is what keeps the package from the internet; the run's random numbers are left alone.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its way to build torchvision's networks is deprecated
            self._network: nn.Module = package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        _load_trunk(self._network.get_submodule("net"), content, path)

    def describe(self) -> str:
        """Version, trunk and its file, range, crop."""
        return f"{self.protocol}, whole frame"

    @torch.no_grad()
    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t"]:
        """The distance of each pair of frames, computed in float32 on their device."""
        check_pair(restored, truth)
        if min(restored.shape[-2:]) < _SMALLEST:
            raise ValueError(f"LPIPS needs frames of at least {_SMALLEST}x{_SMALLEST} px, got {tuple(restored.shape)}")
        network = self._network.to(restored.device)
        pairs = zip(restored.float().unsqueeze(1), truth.float().unsqueeze(1), strict=True)
        return as_values((network(a, b, normalize=True) for a, b in pairs), restored)


class PyIQA:
    """Any metric of a single frame that the package pyiqa has, with or without reference, in its default setting.

    pyiqa's licence (PolyForm Noncommercial) rules out commercial use. It looks for weights in torch's cache, and
    downloads what is missing by itself.

    Args:
        metric: its name there, e.g. dists, niqe, musiq, topiq_fr.

    Raises:
        ValueError: the package is missing, has no such metric, or cannot get its weights.
    """

    unit, digits, frames = "", 4, 1

    def __init__(self, *, metric: str) -> None:
        package = _package("pyiqa", f"the metric {metric}")
        known = package.list_models()
        if metric not in known:
            close = difflib.get_close_matches(metric, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "pyiqa.list_models() lists them"
            raise ValueError(f"pyiqa has no metric {metric!r}; {hint}")
        if "fid" in metric or metric == "inception_score":
            raise ValueError(f"{metric} is a figure of a whole set of images, not of a frame")
        try:
            self._network: nn.Module = package.create_metric(metric, device=torch.device("cpu"))
        except OSError as error:  # what urllib and requests raise offline
            raise ValueError(f"pyiqa cannot load the weights of {metric}: {error}") from error
        self.label = f"{metric} (pyiqa)"
        self.higher_is_better = not self._network.lower_better
        self._with_reference = self._network.metric_mode == "FR"
        self._protocol = f"{metric} of pyiqa {getattr(package, '__version__', 'of unknown version')}, its defaults"

    def describe(self) -> str:
        """The package's version and what is compared."""
        return f"{self._protocol}, on 8-bit RGB, {'against the truth' if self._with_reference else 'without reference'}"

    @torch.no_grad()
    def __call__(self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]) -> Float64[Tensor, " t"]:
        """The score of each frame, computed on the frames' device."""
        check_pair(restored, truth)
        network = self._network.to(restored.device)
        values = []
        for frame, reference in zip(restored, truth, strict=True):
            inputs = (frame[None], reference[None]) if self._with_reference else (frame[None],)
            values.append(network(*inputs))
        return as_values(values, restored)


def _package(name: str, what_for: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise ValueError(f"{what_for} needs the package {missing}: pip install {missing}") from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise ValueError(
            f"{what_for} needs a torchvision that fits torch {torch.__version__}, the installed one does not: {error}"
        ) from error


def _trunk_file(net: str, weights: str | None) -> Path:
    path = Path(weights) if weights else Path(torch.hub.get_dir(), "checkpoints", TRUNKS[net])
    if path.is_file():
        return path
    if weights:
        raise ValueError(f"weights={weights}: there is no such file; LPIPS needs torchvision's {TRUNKS[net]}")
    raise ValueError(
        f"LPIPS needs torchvision's file {TRUNKS[net]}: put it into {path.parent}, or name it with the key weights"
    )


def _origin(content: bytes, net: str) -> str:
    """'' for the published file, else what tells this one apart."""
    digest = hashlib.sha256(content).hexdigest()[:8]
    return "" if TRUNKS[net].endswith(f"-{digest}.pth") else f" (NOT the published weights: SHA-256 {digest})"


def _load_trunk(trunk: nn.Module, content: bytes, path: Path) -> None:
    """Weights of torchvision's ``features.I``, which `lpips` cuts into ``sliceN.I``."""
    try:
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met: the file is bad in each case
        raise ValueError(f"{path}: not a readable file of weights ({type(error).__name__})") from error
    sources = {key: f"features.{key.partition('.')[2]}" for key in trunk.state_dict()}
    missing = [key for key in sources.values() if key not in state]
    if missing:
        raise ValueError(f"{path}: not the trunk of this LPIPS: no {missing[0]}")
    try:
        trunk.load_state_dict({key: state[source] for key, source in sources.items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: not the trunk of this LPIPS: shapes differ") from error
