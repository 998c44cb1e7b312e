"""What a teacher sees of the truth, and what its student learns from it: parts of training with privileged information.

The recipe is that of PISR (Lee et al., "Learning with Privileged Information for Efficient Image Super-Resolution",
ECCV 2020; its released program, cvlab-yonsei/PISR, is the source of the adapters and of the loss with its figures). A
teacher restores with the high-resolution frames at hand; a student without them starts from the teacher's weights
and learns, beside the truth, the teacher's features. Of the teacher nothing is left at inference.

PISR's teacher encodes the truth to a pseudo low-resolution image. Ours is any video network, whose features the truth
adds to through a narrow and noisy path: a reconstruction for networks like ours, which reproduces no published
figure. "Privileged" training is in the title of MFPI (Li et al., ICCV 2023) too, of which no details are public.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, zero
from archs.layers.motion_distillation import laplace_nll, positive


class PrivilegedFeatures(nn.Module):
    """The truth as an addition to low-resolution features; a fresh one adds nothing.

    The path is narrow, ``bottleneck`` channels a low-resolution pixel within -1..1, and in training noisy (white noise
    of standard deviation ``noise``): it can tell where an edge is, but not copy the pictures. ValueError for a
    bottleneck below 1 or a negative noise.
    """

    def __init__(self, channels: int, scale: int, *, bottleneck: int = 4, noise: float = 0.1) -> None:
        super().__init__()
        if bottleneck < 1 or noise < 0:
            raise ValueError(f"bottleneck={bottleneck} must be at least 1 and noise={noise} at least 0")
        self.scale, self.noise = scale, noise
        self.narrow = conv3x3(3 * scale**2, bottleneck)
        self.widen = zero(conv3x3(bottleneck, channels))

    def forward(self, truth: Float[Tensor, "m 3 H W"]) -> Float[Tensor, "m c h w"]:
        """What to add to the features of these frames."""
        code = self.narrow(F.pixel_unshuffle(truth, self.scale)).tanh()  # bounded, or it would outgrow the noise
        if self.training:
            code = code + self.noise * torch.randn_like(code)
        return self.widen(code)


class VariationalAdapter(nn.Module):
    """A Laplace density of the teacher's features, from the student's: mean and scale, each of two 1x1 convolutions."""

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.mean = _adapter(channels, teacher_channels)
        self.scale = _adapter(channels, teacher_channels)

    def forward(self, x: Float[Tensor, "m c h w"]) -> tuple[Tensor, Tensor]:
        """(mu, b), both (M, C', h, w), b = 0.1 softplus(.) + 1e-8."""
        return self.mean(x), positive(self.scale(x), 0.1)


def _adapter(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(channels, channels), nn.PReLU(), conv1x1(channels, channels_out))


class FeatureDistillation(nn.Module):
    """How far a student's features are from telling the teacher's: mean of log(2b) + |mu - t| / b, place by place.

    By the place's name, channels of student and teacher. A lower bound of their mutual information rises as it falls
    (see `archs.layers.motion_distillation`). PISR's figure is larger by the constant C log(2 pi) / 2.
    """

    def __init__(self, channels: Mapping[str, int], teacher_channels: Mapping[str, int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(
            {place: VariationalAdapter(count, teacher_channels[place]) for place, count in channels.items()}
        )

    def forward(self, features: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The sum over places; the teacher's features ``taught`` are targets and get no gradient."""
        losses = [
            laplace_nll(taught[place].detach(), *adapter(features[place])).mean()
            for place, adapter in self.adapters.items()
        ]
        return torch.stack(losses).sum()


class FeatureListener:
    """Hears what parts of a network give, as (M, C, h, w), while it listens; the network's code need not know.

    ValueError for a network without a part. A deep copy of the listener together with its network hears the copy.
    """

    def __init__(self, network: nn.Module, parts: Sequence[str]) -> None:
        missing = [part for part in parts if not isinstance(getattr(network, part, None), nn.Module)]
        if missing:
            raise ValueError(
                f"{type(network).__name__} has no {' and no '.join(missing)}: privileged training needs a network with "
                f"{', '.join(parts)} as submodules, as STDAN has them"
            )
        self.heard: dict[str, Tensor] | None = None
        for part in parts:  # a bound method, not a closure: only that is copied with what it is bound to
            network.get_submodule(part).register_forward_hook(partial(self._hear, part))

    def listen(self) -> None:
        """Forget what was heard, and hear the next pass."""
        self.heard = {}

    def stop(self) -> dict[str, Tensor]:
        """Hear no more; what was heard, by part."""
        heard, self.heard = self.heard or {}, None
        return heard

    def _hear(self, part: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        if self.heard is not None:
            self.heard[part] = output.flatten(0, -4) if output.ndim > 4 else output
