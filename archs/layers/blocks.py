"""Small parts that many networks share: convolutions, pyramids, upsampling, the order of frames."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers import winograd_kernel


def convolve3x3(
    x: Float[Tensor, "... cin h w"], weight: Float[Tensor, "c cin 3 3"], bias: Float[Tensor, " c"] | None = None
) -> Float[Tensor, "... c h w"]:
    """A 3x3 convolution of one image or a batch with stride 1 and zero padding, by the fastest program for it."""
    if winograd_kernel.suits(x, weight):
        return winograd_kernel.conv3x3_kernel(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with stride 1, zero padding and bias."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "... cin h w"]) -> Float[Tensor, "... c h w"]:
        """See `convolve3x3`."""
        return convolve3x3(x, self.weight, self.bias)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with zero padding and bias."""
    if stride == 1:
        return Conv3x3(channels_in, channels_out)
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)


def conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 1x1 convolution with bias."""
    return nn.Conv2d(channels_in, channels_out, 1)


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with weight and bias zero: a branch that is silent until it has learnt something."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def lrelu(x: Tensor) -> Tensor:
    """LeakyReLU with the slope 0.1 that alignment networks use since EDVR."""
    return F.leaky_relu(x, 0.1)


def upsample2x(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
    """Bilinear, twice the size, half-pixel centres."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def per_frame(module: Callable[[Tensor], Tensor], x: Float[Tensor, "b t ..."]) -> Float[Tensor, "b t ..."]:
    """Apply a module or function of images to every frame of a clip."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def stack_frames(frames: Sequence[Float[Tensor, "... c h w"]], dim: int = 1) -> Float[Tensor, "... c h w"]:
    """`torch.stack` that leaves channels last in memory where they are: it would put them first, and the convolution
    that follows would put them back.
    """
    if frames[0].stride(-3) != 1:
        return torch.stack(list(frames), dim)
    return torch.stack([frame.movedim(-3, -1) for frame in frames], dim).movedim(-1, -3)


def interleave(
    inputs: Float[Tensor, "b t c h w"], between: Float[Tensor, "b gaps c h w"]
) -> Float[Tensor, "b t+gaps c h w"]:
    """Frames in order of time: input 0, between 0|1, input 1, ..., the last input."""
    sequence = [frame for pair in zip(inputs.unbind(1), between.unbind(1), strict=False) for frame in pair]
    return stack_frames([*sequence, inputs[:, -1]])


class FeaturePyramid(nn.Module):
    """Features at 1, 1/2, 1/4, ... of the size: per level a strided and a plain convolution, both with lrelu."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.strided = nn.ModuleList(conv3x3(channels, channels, stride=2) for _ in range(levels - 1))
        self.plain = nn.ModuleList(conv3x3(channels, channels) for _ in range(levels - 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Level 0 is ``x`` itself; level l is (B, C, h/2^l, w/2^l)."""
        pyramid = [x]
        for strided, plain in zip(self.strided, self.plain, strict=True):
            pyramid.append(lrelu(plain(lrelu(strided(pyramid[-1])))))
        return pyramid


class PixelShuffleUpsampler(nn.Module):
    """Features -> RGB at ``scale`` times the size (a power of two): convolution, then per x2 a wider one and shuffle.

    As in STDAN: LeakyReLU of slope 0.01 after the first convolution, none elsewhere. ``width`` is the number of
    channels at the enlarged sizes (None: ``channels``, as published).
    """

    def __init__(self, channels: int, scale: int, width: int | None = None) -> None:
        super().__init__()
        if scale < 1 or scale & (scale - 1):
            raise ValueError(f"scale={scale} is not a power of two")
        width = width or channels
        self.before = conv3x3(channels, channels)
        self.widen = nn.ModuleList(conv3x3(width if i else channels, 4 * width) for i in range(scale.bit_length() - 1))
        self.last = conv3x3(width if scale > 1 else channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """(B, C, h, w) -> (B, 3, scale*h, scale*w)."""
        x = F.leaky_relu(self.before(x), 0.01)
        for widen in self.widen:
            x = F.pixel_shuffle(widen(x), 2)
        return self.last(x)


class LightUpsampler(nn.Module):
    """Features -> RGB at 4 or 2 times the size, no convolution at the full size: half the cost of a small network.

    Convolution, for 4 widen and shuffle to x2, LeakyReLU, then a convolution to the 12 values that shuffle to RGB.
    ``width`` is the number of channels at x2 (None: ``channels``); for 2 it has no place.
    """

    def __init__(self, channels: int, scale: int, width: int | None = None) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"the light upsampler has scale 2 or 4, not {scale}")
        width = (width or channels) if scale == 4 else channels
        self.before = conv3x3(channels, channels)
        self.widen = conv3x3(channels, 4 * width) if scale == 4 else None
        self.last = conv3x3(width, 12)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """(B, C, h, w) -> (B, 3, scale*h, scale*w)."""
        x = lrelu(self.before(x))
        if self.widen is not None:
            x = lrelu(F.pixel_shuffle(self.widen(x), 2))
        return F.pixel_shuffle(self.last(x), 2)


UPSAMPLERS: dict[str, type[PixelShuffleUpsampler] | type[LightUpsampler]] = {
    "pixelshuffle": PixelShuffleUpsampler,
    "light": LightUpsampler,
}


class BicubicUpsample(nn.Module):
    """Keys bicubic upscaling (a = -0.5, as MATLAB's) by an integer factor, as one convolution and a pixel shuffle.

    Equal to `restore.degrade.imresize` but for the border (edge pixels repeat here, mirror there), and several times
    faster than `F.interpolate` on a CPU.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        phases = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5  # of each output in its input pixel
        distance = (torch.arange(-2, 3, dtype=torch.float64) - phases[:, None]).abs()
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        taps = torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
        kernel = (taps[:, None, :, None] * taps[None, :, None, :]).reshape(scale * scale, 1, 5, 5)
        self.register_buffer("kernel", kernel.float(), persistent=False)
        self.kernel: Tensor

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """(B, C, h, w) -> (B, C, scale*h, scale*w), float32."""
        with torch.autocast(x.device.type, enabled=False):
            planes = F.pad(x.float().flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
            fine = F.pixel_shuffle(F.conv2d(planes, self.kernel.float()), self.scale)
        return fine.view(*x.shape[:2], *fine.shape[2:])


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero whole items of the batch with probability ``rate`` and rescale the others."""
    if rate == 0 or not training:
        return x
    return x * drop_factors(x, rate).to(x.dtype)


def drop_factors(x: Tensor, rate: float) -> Tensor:
    """What stochastic depth multiplies the items of the batch ``x`` by, drawn anew: (B, 1, ...) float32."""
    keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device, dtype=torch.float32) >= rate
    return keep / (1 - rate)


def linear_rates(highest: float, count: int) -> Sequence[float]:
    """``count`` stochastic-depth rates from 0 to ``highest``, both included."""
    return torch.linspace(0, highest, count).tolist()
