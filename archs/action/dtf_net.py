"""DTF-Net: a ResNet on clips whose every bottleneck filters over time (Long et al., ECCV 2022).

A stem over groups of four frames, then the four stages of a ResNet with 1x3x3 convolutions; `DTFBlock` stands between
the 3x3 convolution and its norm. Nothing else mixes frames, and T/4 of them reach the end. Facts from the published
code. The numbers are reproduced (measured: golden test); no trained weights are published, so no accuracy is.

A clip is RGB in 0..1 in the project's order, (B, T, 3, h, w); the ImageNet normalisation is inside.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.contract import ClipClassifier, and_keywords_of
from archs.layers.dtf import DTFBlock, published_part

STEM_FRAMES = 4  # what the first layer takes for one
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DTFNet(ClipClassifier):
    """Classifier of clips (B, T, 3, h, w) -> logits (B, classes), and `features` of the four stages.

    ``depth`` 50 or 101, or the number of ``blocks`` of each stage. ``clip_length`` is the T of the weights; other T
    that divide by 4 work as ``predictor`` of `DTFBlock` says, which gets all other arguments. Raises ValueError for an
    unknown depth and for lengths that do not divide by 4.
    """

    frames_multiple_of = STEM_FRAMES

    @and_keywords_of(DTFBlock, without=("dim",))
    def __init__(
        self,
        *,
        depth: int = 50,
        clip_length: int = 16,
        classes: int = 400,
        dropout: float = 0.5,
        width: int = 64,
        blocks: tuple[int, int, int, int] | None = None,
        **dtf: Any,
    ) -> None:
        super().__init__()
        if blocks is None and depth not in BLOCKS:
            raise ValueError(f"depth={depth} is none of {', '.join(map(str, BLOCKS))}")
        counts = blocks or BLOCKS[depth]
        frames = groups_of_frames(clip_length, "clip_length=")
        self.classes, self.clip_length = classes, clip_length
        self.normalise = Normalise()
        self.conv1 = nn.Conv3d(3, width, (4, 7, 7), (4, 2, 2), (0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.layer1 = _stage(width, width, counts[0], 1, frames, dtf)
        self.layer2 = _stage(4 * width, 2 * width, counts[1], 2, frames, dtf)
        self.layer3 = _stage(8 * width, 4 * width, counts[2], 2, frames, dtf)
        self.layer4 = _stage(16 * width, 8 * width, counts[3], 2, frames, dtf)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(32 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits of a clip."""
        last = self.features(clip)[-1]
        return self.fc(self.dropout(last.mean((1, 3, 4))))

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Tensor]:
        """After each stage, (B, T/4, C, h/s, w/s): C = 4, 8, 16, 32 times the width, s = 4, 8, 16, 32, rounded up."""
        groups_of_frames(clip.shape[1], "a clip of T=")
        return [stage.transpose(1, 2) for stage in self.stages(self.normalise(clip).transpose(1, 2))]

    def stages(self, x: Float[Tensor, "b 3 t h w"]) -> list[Tensor]:
        """The same of a normalised clip in the published order, (B, 3, T, h, w) -> (B, C, T/4, ...)."""
        x = self.pool(self.bn1(self.conv1(x)).relu())
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found

    def load_published(self, state: Mapping[str, Any]) -> None:
        """Copy a state_dict of the published code, wrapped or not; ValueError lists keys and shapes that differ."""
        load_published(self, state, published_key, constant_correlations(self, published_key))

    def export_published(self) -> dict[str, Tensor]:
        """The state_dict under the published keys, complete."""
        return export_published(self, published_key, constant_correlations(self, published_key))


class DTFBottleneck(nn.Module):
    """1x1x1, 1x3x3, filter over time, 1x1x1 to four times the width, each with its norm; plus the input."""

    def __init__(self, channels: int, width: int, stride: int, frames: int, dtf: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.dtf = DTFBlock(width, frames, **dtf)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            strides = (1, stride, stride)
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, 4 * width, 1, strides, bias=False), nn.BatchNorm3d(4 * width)
            )

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t hs ws"]:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.dtf(self.conv2(y))).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


def _stage(channels: int, width: int, count: int, stride: int, frames: int, dtf: Mapping[str, Any]) -> nn.Sequential:
    first = DTFBottleneck(channels, width, stride, frames, dtf)
    return nn.Sequential(first, *(DTFBottleneck(4 * width, width, 1, frames, dtf) for _ in range(count - 1)))


class Normalise(nn.Module):
    """Subtract ImageNet's mean and divide by its deviation, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
        """RGB in 0..1 -> mean 0, deviation 1 over ImageNet."""
        return (clip - self.mean) / self.std


def groups_of_frames(frames: int, what: str) -> int:
    """How many groups of four; ValueError if they do not divide."""
    if frames < 1 or frames % STEM_FRAMES:
        raise ValueError(f"{what}{frames} does not divide by the {STEM_FRAMES} frames of the first layer")
    return frames // STEM_FRAMES


# ---- published state_dicts, of this network and of DTF-Transformer


def published_key(key: str) -> str:
    """The name that the published DTF-Net gives to our ``key``: torchvision's, and another for the filter's parts."""
    match = re.fullmatch(r"(layer\d\.\d+)\.dtf\.(.+)", key)
    return f"{match[1]}.dtf_blk.{published_part(match[2])}" if match else key


def constant_correlations(network: nn.Module, published: Callable[[str], str]) -> dict[str, Tensor]:
    """Under published keys the frozen weights 1/C of each filter's correlation, (C, T, 3, 3), which ours leaves out."""
    return {
        published(f"{name}.correlation_weight"): torch.full((block.dim, block.clip_length, 3, 3), 1 / block.dim)
        for name, block in network.named_modules()
        if isinstance(block, DTFBlock) and block.correlation_weight is None
    }


def load_published(
    network: nn.Module, state: Mapping[str, Any], published: Callable[[str], str], beside: Mapping[str, Tensor]
) -> None:
    """Copy a published state_dict into ``network``, whose keys ``published`` translates.

    Files {"model": state} and keys that begin with "module." are unwrapped. Keys of ``beside`` follow from the
    constructor or are never used: they may be there or not, but for weights of the correlation that are not constant,
    which the filter then takes. Raises ValueError with all that is missing, unexpected or of another shape.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.get("model", state).items()}
    names = {published(name): name for name in network.state_dict()}
    ours = {key: network.state_dict()[name].shape for key, name in names.items()}
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in {**ours, **{key: tensor.shape for key, tensor in beside.items()}}.items()
        if key in state and state[key].shape != shape
    ]
    lists = {
        "missing": sorted(ours.keys() - state.keys()),
        "unexpected": sorted(state.keys() - ours.keys() - beside.keys()),
        "of another shape (filters are tied to clip_length)": misshapen,
    }
    problems = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in lists.items() if keys]
    if problems:
        raise ValueError("published weights of another network; " + "; ".join(problems))
    for name, block in network.named_modules():
        key = published(f"{name}.correlation_weight") if isinstance(block, DTFBlock) else ""
        if not isinstance(block, DTFBlock) or key not in state or key not in beside:
            continue
        if not torch.allclose(state[key].to(beside[key]), beside[key]):
            if not block.windowed:
                raise ValueError(f"{key} is not constant, which predictor='native' alone can use")
            block.correlation_weight = state[key].to(block.bias)
    network.load_state_dict({name: state[key] for key, name in names.items()}, strict=False)


def export_published(
    network: nn.Module, published: Callable[[str], str], beside: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state_dict of ``network`` under published keys, and what is ``beside``; tensors are shared, not copied."""
    return {**{published(name): tensor for name, tensor in network.state_dict().items()}, **beside}
