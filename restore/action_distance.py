"""How far apart two clips are to a trained action network: the loss `ActionLoss`, the metric `ActionDistance`.

LPIPS (Zhang et al., CVPR 2018) with a network that sees time. For maps f_l of the stages l in ``taps``,

    d(x, y) = mean over l of the mean over channels, places and time of |u(f_l(x)) - u(f_l(y))|^p
    u(v) = v / sqrt(mean over channels of v^2 + eps)            p = 2 ("mse") or 1 ("l1")

A vector of features has root mean square 1, which is LPIPS's unit length times sqrt(C): for p = 2 the mean over
channels is LPIPS's sum with all weights 1, that is 2 - 2 cos of the angle between the two, whatever C. Reconstruction:
no publication is known that compares restored clips by features of DTF or ATM, so no figure is claimed.

Features of random weights measure nothing: a trained checkpoint is required, and none of DTF or ATM is public. What is
said of a number holds for its checkpoint alone. Weights of image networks, which `restore.backbone_weights` takes for a
start of training, load as well, but are blind to motion: with them DTF sees the third of every four frames alone, and
no gradient reaches the others.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from archs.action import CLASSIFIERS
from archs.action.atm_clip import ATMCLIP
from archs.action.dtf_transformer import DTFTransformer
from archs.contract import ClipClassifier
from restore.backbone_weights import load_backbone
from restore.metrics import as_values, check_pair

EPS = 1e-6
ATM_FRAMES = 8  # ATM takes any number of frames; of those it is published for, the least

Distance = Literal["mse", "l1"]


def backbone(section: Mapping[str, Any]) -> ClipClassifier:
    """The network of ``{"type": name, **constructor arguments}``, fresh; ValueError where it cannot be built."""
    name = section.get("type") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or name not in CLASSIFIERS:
        raise ValueError(f"network={section!r}: expected a section whose key type is one of {', '.join(CLASSIFIERS)}")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
    del arguments["type"]
    try:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers are left alone
            return CLASSIFIERS[name](**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"network: these keys build no {name}: {' '.join(str(error).split())}") from error


class FeatureDistance(nn.Module):
    """The distance d(x, y) of clips by a frozen network, in evaluation mode and float32 whatever surrounds it.

    Clips are RGB in [0, 1], (B, T, 3, h, w), of any T: the last frame is repeated up to a multiple of 4 for DTF, and
    another T than that of the weights is dealt with as the network's ``predictor`` says. Where sides must divide, by 4
    for dtf_transformer and by the patch for atm_clip, the middle of the frame counts.

    Raises ValueError for a network that is none, weights that are missing or another's, and stages that it has not.
    """

    def __init__(
        self, *, network: Mapping[str, Any], weights: str | None, taps: tuple[int, ...], distance: Distance
    ) -> None:
        super().__init__()
        if distance not in ("mse", "l1"):
            raise ValueError(f"distance={distance!r} is neither 'mse' nor 'l1'")
        if weights is None:
            raise ValueError(
                "the key weights is missing: a trained checkpoint of the network is needed, since features of random "
                "weights measure nothing"
            )
        self.network = backbone(network)
        self.name, self.taps, self.distance = network["type"], taps, distance
        stages = _stages(self.network)
        if not isinstance(taps, tuple) or not taps or not set(taps) <= set(range(1, stages + 1)):
            raise ValueError(f"taps={taps} are not stages 1..{stages} of {self.name}")
        self.file = Path(weights)
        self.inflated = load_backbone(self.network, self.file) is not None
        self.eval().requires_grad_(False)

    @property
    def clip_length(self) -> int:
        """Frames that the weights are for."""
        return self.network.clip_length or ATM_FRAMES

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Never: statistics of norms are the checkpoint's."""
        return super().train(False)

    def forward(self, restored: Float[Tensor, "b t 3 h w"], truth: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, ""]:
        """The mean over the batch, with a gradient of ``restored`` alone; ValueError for frames less than a patch."""
        self.network.to(restored.device)
        with torch.no_grad():
            expected = self.features(truth)
        distances = []
        for found, wanted in zip(self.features(restored), expected, strict=True):
            difference = found - wanted
            distances.append((difference.square() if self.distance == "mse" else difference.abs()).mean())
        return torch.stack(distances).mean()

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Float[Tensor, "b _ _ _ _"]]:
        """u(f_l) of every tap, (B, T', C, h', w')."""
        with torch.autocast(clip.device.type, enabled=False):
            maps = self.network.features(self._fitted(clip.float()))
            return [u * (u.square().mean(2, keepdim=True) + EPS).rsqrt() for u in (maps[tap - 1] for tap in self.taps)]

    def _fitted(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b _ 3 _ _"]:
        (height, width), side = clip.shape[-2:], self.network.multiple_of
        rows, columns = height - height % side, width - width % side
        if not rows or not columns:
            raise ValueError(f"{self.name} needs frames of at least {side}x{side} px, got {height}x{width}")
        top, left = (height - rows) // 2, (width - columns) // 2
        again = clip[:, -1:].expand(-1, -clip.shape[1] % self.network.frames_multiple_of, -1, -1, -1)
        return torch.cat([clip, again], 1)[..., top : top + rows, left : left + columns]


class ActionLoss(nn.Module):
    """Distance of clips as a trained action network sees them (`restore.action_distance`), beside a loss of pixels.

    ``network`` is {type: dtf_net | dtf_transformer | atm_resnet | atm_clip, ...} with the keywords of its constructor.
    ``weights`` is a file of its trained weights, under our names or the published ones: required. ``taps`` are the
    stages of the network whose features count, the first is 1. ``distance`` of normalised features is "mse" or "l1".

    Its scale is the checkpoint's, so log it apart and let ``loss_weight`` bring it to a tenth of pixel L1 or so.
    Measured unweighted on networks of random weights with calibrated norms, a 1/f texture of 8 frames that moves at
    128x128 and a white error of s = 0.01, 0.02 and 0.05: DTF-Net-50 is 26, 20 and 14 times pixel L1, DTF-Transformer-S
    (6 blocks in its third stage) 0.09, 0.17 and 0.42 times; with "l1" 35, 24, 13 and 2.3 at all three.
    """

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        weights: str | None = None,
        taps: tuple[int, ...] = (1, 2, 3),
        distance: Distance = "mse",
        loss_weight: float = 0.01,
    ) -> None:
        super().__init__()
        self.distance = FeatureDistance(network=network, weights=weights, taps=taps, distance=distance)
        self.loss_weight = loss_weight

    def forward(self, restored: Float[Tensor, "b t 3 h w"], truth: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        return self.loss_weight * self.distance(restored, truth)


class ActionDistance:
    """Distance of clips as a trained action network sees them, a value for every window of frames; 0 is best.

    The figure of a clip is the mean over its windows; one ends at every frame from the first whole one on. It sees how
    frames follow each other, which figures of single frames do not.

    ``network``, ``weights``, ``taps`` and ``distance`` are those of `ActionLoss`. ``window`` is in frames: null stands
    for what the weights are for, 8 for ATM, which takes any number. Shorter clips have no figure.
    """

    unit, higher_is_better, digits = "", False, 4

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        weights: str | None = None,
        taps: tuple[int, ...] = (1, 2, 3),
        distance: Distance = "mse",
        window: int | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1 frame")
        self._distance = FeatureDistance(network=network, weights=weights, taps=taps, distance=distance)
        self._digest = hashlib.sha256(self._distance.file.read_bytes()).hexdigest()[:8]
        self.frames = window or self._distance.clip_length
        self.label = f"action ({self._distance.name})"

    def describe(self) -> str:
        """Formula, network and its file, stages, window, sizes."""
        ours = self._distance
        kind = "squared" if ours.distance == "mse" else "absolute"
        cut = f"sides cut to multiples of {ours.network.multiple_of}" if ours.network.multiple_of > 1 else "whole frame"
        return (
            f"action distance (ours, after LPIPS): mean {kind} difference of features of root mean square 1, stages "
            f"{', '.join(map(str, ours.taps))} of {ours.name} with weights {ours.file.name} (SHA-256 {self._digest}"
            f"{', of an image network' if ours.inflated else ''}), windows of {self.frames} frames of 8-bit RGB, {cut}"
        )

    @torch.no_grad()
    def __call__(
        self, restored: Float[Tensor, "t 3 h w"], truth: Float[Tensor, "t 3 h w"]
    ) -> Float64[Tensor, " t-{self.frames}+1"]:
        """Value i is that of the window of frames i .. i + frames - 1, computed on the frames' device."""
        check_pair(restored, truth)
        if len(truth) < self.frames:
            raise ValueError(f"{self.label} needs clips of at least {self.frames} frames, got {len(truth)}: set window")
        windows = (slice(i, i + self.frames) for i in range(len(truth) - self.frames + 1))
        return as_values((self._distance(restored[None, w], truth[None, w]) for w in windows), restored)


def _stages(network: ClipClassifier) -> int:
    """How many maps its `features` gives."""
    if isinstance(network, ATMCLIP):
        return len(network.taps)
    return len(network.layers) if isinstance(network, DTFTransformer) else 4
