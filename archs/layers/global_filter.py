"""Filters of the whole image: one product in the Fourier domain, for GFNet's dense filter and for our analytic bands.

All compute x + F^-1(delta * F x): the response is 1 + delta with delta zero at the start, so a fresh filter changes
nothing. They are linear and differ in what delta is:

- `RadialFilter`, `PolarFilter`: learnt gains of hat-shaped bands. Nothing depends on the grid: train on crops, run on
  frames. The default choice, and our own: it reproduces no published component.
- `GlobalFilter`: every bin learnt, as in GFNet (Rao et al., NeurIPS 2021, arXiv 2107.00645), which fixes one grid.
  Departs from it: identity at the start instead of noise, channels first, and on other grids the same *kernel* instead
  of an interpolated spectrum; ``resize="bicubic"`` is GFNet's. Measured for a dense kernel learnt at 32x32 and used at
  180x320: relative error of the effect .00 against .43.

Boundary: the image is taken as periodic, as in GFNet, so opposite edges see each other. With ``padding`` > 0 it is
reflected by so many pixels first and cropped after: the radius of the kernel is enough, at the cost of the larger area.
"""

from math import prod, sqrt

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import drop_path
from archs.layers.spectral import irfft2, polar_bands, radial_bands, reflect_pad, rfft2


class SpectralFilter(nn.Module):
    """x + F^-1(delta * F x) for the delta that a subclass gives; computed in float32, the dtype of x out, any size.

    In evaluation without gradients the delta of the last size is kept until the weight changes. Writing into
    ``weight.data`` is not seen: call ``eval()`` after it.
    """

    def __init__(self, weight: Tensor, padding: int) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding={padding} px is negative")
        self.padding = padding
        self.weight = nn.Parameter(weight)
        self._kept: tuple[tuple[int, ...], Tensor] | None = None  # what the delta was made from, and the delta

    def delta(self, height: int, width: int) -> Tensor:
        """The response less 1 on a grid, (C, h, w//2+1), real or complex."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The filtered image."""
        h, w = x.shape[-2:]
        p = self.padding
        size = (h + 2 * p, w + 2 * p)
        with torch.autocast(x.device.type, enabled=False):
            spectrum = rfft2(reflect_pad(x, (p, p), (p, p)))
            change = irfft2(spectrum * self._delta(size), size)[..., p : p + h, p : p + w]
            return (x.float() + change).to(x.dtype)

    def train(self, mode: bool = True) -> "SpectralFilter":
        """Switch between training and evaluation; either way the kept delta is forgotten."""
        self._kept = None
        return super().train(mode)

    def _delta(self, size: tuple[int, int]) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            return self.delta(*size)
        source = (*size, self.weight.data_ptr(), self.weight._version)
        if self._kept is None or self._kept[0] != source:
            self._kept = source, self.delta(*size)
        return self._kept[1]


class RadialFilter(SpectralFilter):
    """A gain per channel and radial band: g_c(f) = 1 + sum_k weight_ck H_k(f), the hats of `radial_bands`.

    Isotropic: it sharpens or blurs all directions alike. Some 99% of its kernel's energy lie within ``bands`` pixels.
    """

    def __init__(self, channels: int, bands: int = 8, *, padding: int = 0) -> None:
        super().__init__(torch.zeros(channels, bands), padding)

    def delta(self, height: int, width: int) -> Float[Tensor, "c {height} wf"]:
        """Real, (C, h, w//2+1)."""
        bands = radial_bands(height, width, self.weight.shape[1], self.weight.device)
        return torch.einsum("ck,khw->chw", self.weight.float(), bands)


class PolarFilter(SpectralFilter):
    """A gain per channel, radius and direction: as `RadialFilter`, with the hats of `polar_bands`.

    For what has a direction, as motion blur has. Measured where the same bands weigh aligned frames of synthetic
    textures, each blurred along another direction: 24.9 dB with 8 x 8 polar bands, 22.4 dB with 8 radial ones.
    """

    def __init__(self, channels: int, radial: int = 8, angular: int = 8, *, padding: int = 0) -> None:
        super().__init__(torch.zeros(channels, radial * angular), padding)
        self.radial, self.angular = radial, angular

    def delta(self, height: int, width: int) -> Float[Tensor, "c {height} wf"]:
        """Real, (C, h, w//2+1)."""
        bands = polar_bands(height, width, self.radial, self.angular, self.weight.device)
        return torch.einsum("ck,khw->chw", self.weight.float(), bands)


class GlobalFilter(SpectralFilter):
    """GFNet's filter: a complex gain per channel and bin of a (height, width) grid, 2 * C * h * (w//2+1) parameters.

    The weight holds real and imaginary parts, (C, h, w//2+1, 2), so that optimisers, averages and checkpoints see
    plain floats. On other grids ``resize`` decides: "kernel" (`resize_kernel`, exact) or "bicubic" (`resize_bicubic`).
    Of the columns 0 and w/2 only the part with the symmetry of a real image has an effect or a gradient.
    """

    def __init__(self, channels: int, height: int, width: int, *, resize: str = "kernel", padding: int = 0) -> None:
        super().__init__(torch.zeros(channels, height, width // 2 + 1, 2), padding)
        if resize not in RESIZERS:
            raise ValueError(f"resize={resize!r} is none of {', '.join(RESIZERS)}")
        self.size, self.resize = (height, width), resize

    def delta(self, height: int, width: int) -> Complex[Tensor, "c {height} wf"]:
        """Complex, (C, h, w//2+1)."""
        delta = torch.view_as_complex(self.weight.float().contiguous())
        if (height, width) == self.size:
            return delta
        return RESIZERS[self.resize](delta, self.size, (height, width))


def resize_kernel(
    response: Complex[Tensor, "c h wf"], size: tuple[int, int], to: tuple[int, int]
) -> Complex[Tensor, "c {to[0]} {to[1]}//2+1"]:
    """The response on grid ``to`` of the spatial kernel that has ``response`` on grid ``size``.

    On larger grids the kernel is padded by zeros: the same convolution, exactly, which reaches no farther than half
    the old grid. On smaller grids it is cropped: taps farther than half the new grid are lost.
    """
    kernel = torch.fft.fftshift(irfft2(response, size), dim=(-2, -1))  # displacement 0 at h//2, w//2
    before = [new // 2 - old // 2 for old, new in zip(size, to, strict=True)]
    after = [new - old - first for old, new, first in zip(size, to, before, strict=True)]
    kernel = F.pad(kernel, (before[1], after[1], before[0], after[0]))  # a negative amount crops
    return rfft2(torch.fft.ifftshift(kernel, dim=(-2, -1))) * sqrt(prod(to) / prod(size))  # as norms are "ortho"


def resize_bicubic(
    response: Complex[Tensor, "c h wf"], size: tuple[int, int], to: tuple[int, int]
) -> Complex[Tensor, "c {to[0]} {to[1]}//2+1"]:
    """The response interpolated as if it were a picture, as GFNet does for fine-tuning: corners aligned, no shift.

    For the ablation: rows of positive and negative frequency are blended where they meet, at the Nyquist row.
    """
    picture = torch.view_as_real(response).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, (to[0], to[1] // 2 + 1), mode="bicubic", align_corners=True)
    return torch.view_as_complex(picture.permute(0, 2, 3, 1).contiguous())


RESIZERS = {"kernel": resize_kernel, "bicubic": resize_bicubic}


class GlobalFilterBlock(nn.Module):
    """GFNet's block, x + drop_path(MLP(LN(filter(LN(x))))): one residual around filter and MLP (GELU)."""

    def __init__(
        self, channels: int, spectral_filter: SpectralFilter, *, mlp_ratio: float = 4, drop_rate: float = 0
    ) -> None:
        super().__init__()
        hidden = round(channels * mlp_ratio)
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(channels)
        self.filter = spectral_filter
        self.norm2 = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape out."""
        y = self.filter(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        y = self.narrow(F.gelu(self.widen(self.norm2(y.permute(0, 2, 3, 1)))))
        return x + drop_path(y.permute(0, 3, 1, 2), self.drop_rate, self.training)
