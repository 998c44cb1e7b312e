"""ATM in a ResNet: actions from frames that meet in arithmetic between the stages of a ResNet.

Reconstruction: the paper (Wu et al., ICCV 2023) puts ATM between stages of a ResNet and adds it to the features; its
program for that is not released. Which stage, which operations and at which resolution are our own choices: after the
second stage, multiplication then subtraction as in the released vision transformer, on every second pixel. No figure
of the paper is claimed for it.

The ResNet is that of He et al. (CVPR 2016) with the stride in the 3x3 convolution; names are torchvision's, so that its
ImageNet weights load by ``load_state_dict(state, strict=False)`` once ``fc`` is taken out.
"""

from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action.dtf_net import Normalise
from archs.contract import ClipClassifier
from archs.layers.atm import ATMBranch, Ends, Norm, Operation

BLOCKS: dict[int, tuple[int, ...]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ATMResNet(ClipClassifier):
    """Classifier and features of clips: float RGB in [0, 1], (B, T, 3, H, W), any T, H and W.

    ``depth`` 50 or 101, or four numbers of blocks. ``after`` are the stages (1..4) that ATM follows, where each of the
    ``operations`` is one `ATMBranch` in turn. Stages end in a ReLU, so that fresh ATM changes nothing: the network
    starts as its ResNet on every frame, whose pooled features are averaged over time.
    """

    def __init__(
        self, *, classes: int, depth: int | tuple[int, int, int, int] = 50, width: int = 64,
        after: tuple[int, ...] = (2,), operations: tuple[Operation, ...] = ("mul", "sub"), hidden: int = 64,
        context: int = 5, stride: int = 2, ends: Ends = "zeros", norm: Norm = "batch", dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(depth, int) and depth not in BLOCKS:
            raise ValueError(f"depth={depth} is none of {', '.join(map(str, BLOCKS))}, nor four numbers of blocks")
        if not set(after) <= {1, 2, 3, 4}:
            raise ValueError(f"after={after} are not stages 1..4")
        self.classes = classes
        self.normalise = Normalise()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        counts = BLOCKS[depth] if isinstance(depth, int) else depth
        widths = (width, 4 * width, 8 * width, 16 * width, 32 * width)
        for i, (count, (before, behind)) in enumerate(zip(counts, pairwise(widths), strict=True)):
            self.add_module(f"layer{i + 1}", _stage(before, behind // 4, count, 2 if i else 1))
        self.feature_channels = widths[1:]
        self.feature_strides = (4, 8, 16, 32)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

        def branches(channels: int) -> nn.Sequential:
            shared: dict[str, Any] = {
                "hidden": hidden,
                "context": context,
                "stride": stride,
                "ends": ends,
                "norm": norm,
            }
            return nn.Sequential(*(ATMBranch(channels, operation=name, **shared) for name in operations))

        self.atm = nn.ModuleDict({str(stage): branches(widths[stage]) for stage in sorted(set(after))})
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[4], classes)

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits of a clip."""
        return self.fc(self.dropout(self.features(clip)[-1].mean((1, 3, 4))))

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Float[Tensor, "b t c hs ws"]]:
        """After each stage and its ATM (B, T, C, H/s, W/s): C = 4, 8, 16, 32 widths, s = 4, 8, 16, 32, rounded up."""
        shape = clip.shape[:2]
        x = F.relu(self.bn1(self.conv1(self.normalise(clip).flatten(0, 1))))
        x = F.max_pool2d(x, 3, 2, 1)
        found = []
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
            if str(i) in self.atm:
                x = self.atm[str(i)](x.unflatten(0, shape)).flatten(0, 1)
            found.append(x.unflatten(0, shape))
        return found


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width, each with its norm; plus the input."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        """(N, C, H, W) -> (N, 4 * width, H/stride, W/stride), rounded up."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _stage(channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(count - 1)))
