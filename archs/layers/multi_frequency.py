"""Features enhanced in space and frequency at once: global filters beside large kernels, gains from band energies.

`FrequencyEnhancement` is inspired by MFPI (Li et al., "Multi-Frequency Representation Enhancement with Privilege
Information for Video Super-Resolution", ICCV 2023), of which no code is public: its intent is known (a Fourier branch
for the whole image together with a large kernel, learnable filters and instance norm, energies for the channels), its
layers are not. The structure here is our reconstruction and reproduces no published figure. `FreqSpatialBlock` is the
standard block of two branches, as in DeepRFT (Mao et al., "Deep Residual Fourier Transformation for Single Image
Deblurring", arXiv 2111.11745).

All take images (B, C, h, w) of any size and change nothing at the start: every branch ends in zeros. Spectra and what
is computed from them are float32 whatever autocast says; the result has the dtype of the input.
"""

from collections.abc import Callable
from math import sqrt

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, lrelu, zero
from archs.layers.energy_fusion import ChannelAttention
from archs.layers.global_filter import GlobalFilter, PolarFilter, RadialFilter, SpectralFilter
from archs.layers.spectral import irfft2, rfft2

FILTERS: dict[str, Callable[[int, tuple[int, int]], SpectralFilter]] = {  # of so many channels, learnt on such a grid
    "radial": lambda channels, grid: RadialFilter(channels),
    "polar": lambda channels, grid: PolarFilter(channels),
    "global": lambda channels, grid: GlobalFilter(channels, *grid),
    "global_bicubic": lambda channels, grid: GlobalFilter(channels, *grid, resize="bicubic"),  # resized as GFNet does
}


class FreqSpatialBlock(nn.Module):
    """x + S(x) + Q(x): two 3x3 convolutions in space, two 1x1 convolutions in frequency, each with a ReLU between.

    Q acts on real and imaginary parts side by side, as in DeepRFT (there of norm "backward"). ReLU treats them by
    phase, so a shifted image is not treated alike. With ``magnitude`` Q acts on |X| and keeps the phase, which commutes
    with circular shifts and has a quarter of the parameters. About 26 C^2 parameters, or 20 C^2.
    """

    def __init__(self, channels: int, *, magnitude: bool = False) -> None:
        super().__init__()
        self.magnitude = magnitude
        planes = channels if magnitude else 2 * channels
        self.spatial = nn.Sequential(conv3x3(channels, channels), nn.ReLU(), zero(conv3x3(channels, channels)))
        self.first, self.last = conv1x1(planes, planes), zero(conv1x1(planes, planes))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        spectrum = rfft2(x)
        if self.magnitude:
            size = spectrum.abs()
            change = self._spectral(size) * (spectrum / (size + 1e-3))  # soft: no gradient explodes where nothing is
        else:
            parts = self._spectral(torch.cat([spectrum.real, spectrum.imag], dim=1))
            change = torch.complex(*parts.chunk(2, dim=1))
        return x + (self.spatial(x) + irfft2(change, x.shape[-2:])).to(x.dtype)

    def _spectral(self, planes: Float[Tensor, "b p h wf"]) -> Float[Tensor, "b p h wf"]:
        with torch.autocast(planes.device.type, enabled=False):
            return _in_float32(self.last, F.relu(_in_float32(self.first, planes)))


class SpectralConv1x1(nn.Module):
    """The same complex matrices at all frequencies: channels of a half spectrum mixed within ``groups``.

    A 1x1 convolution 2C -> 2C of real and imaginary parts that is confined to what a complex product does. Free, it
    would also mix in the conjugate, that is the image mirrored about its first pixel. No bias: at all frequencies
    it would be an impulse on that pixel. The weight holds real and imaginary parts, (groups, C/groups, C/groups, 2).
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} do not divide into groups={groups}")
        width = channels // groups
        self.weight = nn.Parameter(torch.randn(groups, width, width, 2) / sqrt(2 * width))

    def forward(self, spectrum: Complex[Tensor, "b c h wf"]) -> Complex[Tensor, "b c h wf"]:
        """Same shape out, complex64."""
        with torch.autocast(spectrum.device.type, enabled=False):
            weight = torch.view_as_complex(self.weight.float().contiguous())
            grouped = spectrum.unflatten(1, weight.shape[:2])  # (B, groups, C/groups, h, wf)
            return torch.einsum("goi,bgihw->bgohw", weight, grouped).flatten(1, 2)


class SpatialFrequencyEnhancement(nn.Module):
    """x + fuse(global branch, local branch): what one filter sees of the whole image, and a kernel of 13x13.

    Global: 1x1 -> ``spectral_filter`` -> instance norm -> complex 1x1 in 4 groups; linear but for the norm, whose
    statistics are of the image at hand, never running ones. It takes the mean away, which the sum brings back. Local:
    depthwise 13x13 -> LeakyReLU -> 1x1. ``spectral_filter`` acts on ``channels``, which must divide by 4.
    """

    def __init__(self, channels: int, spectral_filter: SpectralFilter) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1, bias=False)  # the norm would take a bias away
        self.filter = spectral_filter
        self.norm = nn.InstanceNorm2d(channels, affine=True)
        self.mix = SpectralConv1x1(channels, groups=4)
        self.depthwise = nn.Conv2d(channels, channels, 13, padding=6, groups=channels)
        self.pointwise = conv1x1(channels, channels)
        self.fuse = zero(conv1x1(2 * channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        local = self.pointwise(lrelu(self.depthwise(x)))
        return x + self.fuse(torch.cat([self._global(x).to(local.dtype), local], dim=1)).to(x.dtype)

    def _global(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.filter(self.project(x).float())
        with torch.autocast(x.device.type, enabled=False):
            y = F.instance_norm(y, weight=self.norm.weight.float(), bias=self.norm.bias.float(), eps=self.norm.eps)
        return irfft2(self.mix(rfft2(y)), x.shape[-2:])


# MFPI's energy-frequency enhancement: channels weighed by their energies in radial bands. One idea, two places.
EnergyFrequencyEnhancement = ChannelAttention


class FrequencyEnhancement(nn.Module):
    """`SpatialFrequencyEnhancement`, then `EnergyFrequencyEnhancement`: places P1 and P4 of STDAN-freq.

    ``filter`` is "radial", "polar" (for what has a direction, as motion blur has) or "global", which is learnt on
    ``grid`` (h, w) and is the same kernel on any other. With 64 channels 32,369, 35,953 and, on 32x32, 101,489
    parameters. ValueError for another filter or channels that do not divide by 4.
    """

    def __init__(self, channels: int, *, filter: str = "radial", grid: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        if filter not in FILTERS:
            raise ValueError(f"filter={filter!r} is none of {', '.join(FILTERS)}")
        self.spatial = SpatialFrequencyEnhancement(channels, FILTERS[filter](channels, grid))
        self.energy = EnergyFrequencyEnhancement(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        return self.energy(self.spatial(x))


class PlainEnhancement(nn.Module):
    """x + two 3x3 convolutions through half the channels: the control, of about the size of a `FrequencyEnhancement`.

    With 64 channels 36,960 parameters. What an enhancement in frequency gains must be more than what this does.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = conv3x3(channels, channels // 2)
        self.widen = zero(conv3x3(channels // 2, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        return x + self.widen(lrelu(self.narrow(x)))


def _in_float32(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Tensor:
    """A convolution of float32 by weights that may be of half precision."""
    return F.conv2d(x, conv.weight.float(), None if conv.bias is None else conv.bias.float())
