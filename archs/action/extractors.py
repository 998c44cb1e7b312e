"""Action backbones as encoders of restoration networks: their first layers at every frame and, if need be, every pixel.

Stem and first stage of `DTFNet` or `ATMResNet`, whose blocks and names of weights they keep, so that ImageNet's and
those of a trained action network load. In a classifier the stem takes four frames for one and every fourth pixel in
both directions; here every frame has features, on the grid that the restoration needs:

- In time DTF-Net's stem takes steps of one frame. It sees two frames before and one after, the first and last frame
  standing for what is beyond them, so that inflated ImageNet weights, those of the third of four, see the frame itself.
- On the grid of the input the stem takes steps of one pixel, its pooling compares every second one, and the stage runs
  on each of the 16 pictures of every fourth pixel. Of all features every fourth is the classifier's.
- On a grid of a quarter of the size (networks that deblur) nothing is changed in space.

What plain convolutions see of the frames is added, so that no detail is lost. Norms keep the statistics that they were
loaded with: batches of a restoration network are too small for new ones. The place of action backbones in such a
network, and all of this, is our own; no published network is reproduced.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action.atm_resnet import ATMResNet
from archs.action.dtf_net import DTFNet
from archs.action.inflate import inflate, spelling_of_video_weights
from archs.layers.blocks import conv3x3, per_frame

STEP = 4  # pixels of the input a feature of the first stage, and its channels as multiples of the stem's
BLOCKS = (3, 1, 1, 1)  # of the stages: the first is that of ResNet-50 and 101, the others go
BEFORE, AFTER = 2, 1  # frames that DTF-Net's stem sees beside the frame itself


class ActionExtractor(nn.Module, ABC):
    """Features of clips from ``backbone``, which has a stem of ``channels`` and keeps only that and its first stage.

    ``dense``: on the grid of the input, h x w; else on one of a quarter of the size, rounded up.
    """

    made_of: str  # the network whose weights fit

    def __init__(self, backbone: DTFNet | ATMResNet, channels: int, *, dense: bool) -> None:
        super().__init__()
        for part in ("layer2", "layer3", "layer4", "dropout", "fc"):
            delattr(backbone, part)
        self.backbone, self.dense = backbone, dense
        self.project = conv3x3(STEP * channels, channels)

    def forward(self, clip: Float[Tensor, "b t 3 H W"], seen: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """RGB in 0..1, and what plain convolutions have ``seen`` of it on the grid of the features, which is added."""
        first = self._convolved(self.backbone.normalise(clip), 1 if self.dense else 2).relu()
        if self.dense:  # nothing is below 0, so that padding by 0 is none
            pooled = F.max_pool2d(F.pad(first.flatten(0, 1), (2, 2, 2, 2)), 3, 1, dilation=2)
            deep = at_every_pixel(self._stage, pooled.unflatten(0, clip.shape[:2]), STEP)
        else:
            deep = self._stage(F.max_pool2d(first.flatten(0, 1), 3, 2, 1).unflatten(0, clip.shape[:2]))
        return seen + per_frame(self.project, deep)

    def train(self, mode: bool = True) -> "ActionExtractor":
        """Training mode for all but the norms over batches."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.eval()
        return self

    @property
    def groups(self) -> Iterator[nn.Module]:
        """The blocks whose activations are worth computing twice."""
        return self.backbone.get_submodule("layer1").children()

    def load_backbone(self, state: Mapping[str, Tensor]) -> list[str]:
        """Copy weights of the action network, or of a ResNet of images, under their keys.

        Later stages and the classifier in ``state`` are left out. Returns the keys that stayed fresh: of the blocks
        between frames, which a ResNet lacks. ValueError for weights of another network or width.
        """
        state = {key: tensor for key, tensor in state.items() if not re.match(r"layer[234]\.|atm\.[234]\.|fc\.", key)}
        if spelling_of_video_weights(state) is None:
            fresh = inflate(self.backbone, state).fresh
            return [key for key in fresh if not key.endswith("num_batches_tracked")]
        mine = self.backbone.state_dict()
        wrong = sorted(state.keys() ^ mine.keys())
        wrong += [key for key in mine if key not in wrong and state[key].shape != mine[key].shape]
        if wrong:
            raise ValueError(
                f"not the weights of {self.made_of}; {len(wrong)} are missing, unknown or of another shape: "
                f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
            )
        self.backbone.load_state_dict(dict(state))
        return []

    @abstractmethod
    def _convolved(self, clip: Float[Tensor, "b t 3 H W"], stride: int) -> Float[Tensor, "b t c h w"]:
        """The first convolution and its norm."""

    @abstractmethod
    def _stage(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d h w"]:
        """The first stage."""


class DTFExtractor(ActionExtractor):
    """Of `DTFNet`: a filter over time in every bottleneck, of taps that fit any number of frames."""

    made_of = "DTFNet(predictor='taps', norm='gn', sharing='paper'), as wide as this network's channels"
    backbone: DTFNet

    def __init__(self, channels: int, *, dense: bool = True) -> None:
        backbone = DTFNet(
            blocks=BLOCKS, width=channels, classes=1, groups=gcd(channels, 16), sharing="paper", predictor="taps",
            norm="gn",
        )  # fmt: skip
        super().__init__(backbone, channels, dense=dense)

    def _convolved(self, clip: Float[Tensor, "b t 3 H W"], stride: int) -> Float[Tensor, "b t c h w"]:
        times = torch.arange(-BEFORE, clip.shape[1] + AFTER, device=clip.device).clamp(0, clip.shape[1] - 1)
        frames = clip[:, times].transpose(1, 2)  # (B, 3, T + 3, H, W)
        x = F.conv3d(frames, self.backbone.conv1.weight, stride=(1, stride, stride), padding=(0, 3, 3))
        return self.backbone.bn1(x).transpose(1, 2)

    def _stage(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d h w"]:
        return self.backbone.layer1(x.transpose(1, 2)).transpose(1, 2)


class ATMExtractor(ActionExtractor):
    """Of `ATMResNet`: a ResNet on every frame, then ATM, narrow, with the frames before and after."""

    made_of = "ATMResNet(after=(1,), hidden=32, context=3, norm='group'), as wide as this network's channels"
    backbone: ATMResNet

    def __init__(self, channels: int, *, dense: bool = True) -> None:
        backbone = ATMResNet(
            classes=1, depth=BLOCKS, width=channels, after=(1,), hidden=32, context=3, ends="replicate", norm="group"
        )
        super().__init__(backbone, channels, dense=dense)

    def _convolved(self, clip: Float[Tensor, "b t 3 H W"], stride: int) -> Float[Tensor, "b t c h w"]:
        x = F.conv2d(clip.flatten(0, 1), self.backbone.conv1.weight, stride=stride, padding=3)
        return self.backbone.bn1(x).unflatten(0, clip.shape[:2])

    def _stage(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d h w"]:
        return self.backbone.atm["1"](per_frame(self.backbone.get_submodule("layer1"), x))


EXTRACTORS: dict[str, type[DTFExtractor] | type[ATMExtractor]] = {
    "dtf_resnet": DTFExtractor,
    "atm_resnet": ATMExtractor,
}


def at_every_pixel(
    stage: Callable[[Tensor], Tensor], x: Float[Tensor, "b t c h w"], step: int
) -> Float[Tensor, "b t d h w"]:
    """``stage`` on each of the ``step``^2 pictures that every step-th pixel makes; what it finds, put together again.

    As if its convolutions were dilated, with a stage that is left as it is. Where step does not divide h and w, zeros
    at the bottom and right fill the pictures.
    """
    b, _, _, h, w = x.shape
    padded = F.pad(x, (0, -w % step, 0, -h % step))
    grid = padded.unflatten(4, (-1, step)).unflatten(3, (-1, step))  # (B, T, C, h/s, s, w/s, s)
    pictures = grid.permute(4, 6, 0, 1, 2, 3, 5).flatten(0, 2)  # (s*s*B, T, C, h/s, w/s)
    found = stage(pictures).unflatten(0, (step, step, b)).permute(2, 3, 4, 5, 0, 6, 1)
    return found.flatten(5, 6).flatten(3, 4)[..., :h, :w]
