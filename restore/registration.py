"""How far frames lie beside others, to a fraction of a pixel, whatever their sharpness, noise, contrast or brightness.

First the best whole shift by normalised cross-correlation (in the Fourier domain), then Gauss-Newton steps of least
squares on shift, contrast and brightness together (Lucas and Kanade, "An iterative image registration technique",
1981). Only the frames taken for clean are interpolated, so noise and symmetric blur of the others bias nothing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

REACH = 5  # pixels, the largest shift that is found
_TAPS = 8  # half width of the interpolating kernel: sharp, so that interpolation itself changes no figure
MARGIN = REACH + _TAPS  # pixels that `shifted` needs around its result
_STEPS = 6
_SMOOTHING = 5  # pixels; detail that only the clean frames have shortens the steps
_RIDGE = 1e-3  # of the gradients' energy; along straight edges the shift is undetermined and stays what it was


class Shift(NamedTuple):
    """Where something lies, in pixels below and right of where it should."""

    down: float
    right: float

    @property
    def length(self) -> float:
        """In pixels."""
        return (self.down**2 + self.right**2) ** 0.5


NO_SHIFT = Shift(0.0, 0.0)


def shifted(x: Float[Tensor, "*b h w"], shift: Shift) -> Float[Tensor, "*b H W"]:
    """Move frames down and right by up to `REACH` pixels, interpolating with a Lanczos kernel of 16 taps.

    `MARGIN` pixels at each side are missing in the result; no shift gives the rest of x itself.
    """
    for dim, amount in zip((-2, -1), shift, strict=True):
        distance = torch.arange(-MARGIN, MARGIN + 1, dtype=torch.float64) + amount
        used = (distance.abs() < _TAPS) if amount else distance == 0
        kernel = torch.sinc(distance[used]) * torch.sinc(distance[used] / _TAPS)
        weights = (kernel / kernel.sum()).tolist()
        first, length = int(used.nonzero()[0]), x.shape[dim] - 2 * MARGIN
        # Weighted copies: twice as fast as a convolution with one channel.
        moved = x.narrow(dim, first, length) * weights[0]
        for k, weight in enumerate(weights[1:], start=first + 1):
            moved.add_(x.narrow(dim, k, length), alpha=weight)
        x = moved
    return x


def inside(x: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b H W"]:
    """Leave out what is missing in the result of `shifted`."""
    return x[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def register(frames: Float[Tensor, "t h w"], clean: Float[Tensor, "t h w"]) -> Shift:
    """Where frames lie relative to clean ones: one shift for all, such that frames ~ gain * shifted(clean) + offset.

    Frames of more than 2 `MARGIN` pixels a side; one plane each, values of about [0, 1]. `NO_SHIFT` where nothing is
    alike, and along directions without detail.
    """
    frames, clean = (avg_pool2d(x, _SMOOTHING, 1, _SMOOTHING // 2, count_include_pad=False) for x in (frames, clean))
    shift = _whole_shift(frames, clean)
    target = _centred(inside(frames)).flatten()
    for _ in range(_STEPS):
        model = shifted(clean, shift)
        down, right = torch.gradient(model, dim=(-2, -1))
        columns = torch.stack([part.flatten() for part in (_centred(model), -down, -right)]).double()
        normal = columns @ columns.T
        gradients = normal.diagonal()[1:].sum()
        normal.diagonal().add_(torch.tensor([1.0, gradients, gradients]).to(normal) * _RIDGE + 1e-9)
        gain, *moves = torch.linalg.solve(normal, columns @ target.double()).tolist()
        if gain < _RIDGE:
            return NO_SHIFT
        moves = [min(max(move / gain, -1.0), 1.0) for move in moves]
        shift = Shift(*(min(max(at + move, -REACH), REACH) for at, move in zip(shift, moves, strict=True)))
        if max(map(abs, moves)) < 3e-3:
            break
    return shift


def _whole_shift(frames: Tensor, clean: Tensor) -> Shift:
    """Of all shifts by whole pixels up to `REACH`, the one of the largest normalised cross-correlation."""
    size = frames.shape[-2:]
    middle, mask = torch.zeros_like(frames), torch.zeros_like(frames)
    inside(middle).copy_(_centred(inside(frames)))
    inside(mask).fill_(1)
    clean = _centred(clean)

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        spectrum = (torch.fft.rfft2(a).conj() * torch.fft.rfft2(b)).sum(0)
        every = torch.fft.irfft2(spectrum, s=size)
        return every.roll((REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]

    alike = correlation(middle, clean) / correlation(mask, clean.square()).clamp(min=1e-6).sqrt()
    # The shortest of equals: of all of them in flat frames, of those across straight edges.
    best = (alike >= alike.max() * (1 - 1e-4) - 1e-6).nonzero() - REACH
    row, column = best[best.square().sum(1).argmin()].tolist()
    return Shift(-float(row), -float(column))


def _centred(x: Tensor) -> Tensor:
    """Without the mean of each frame."""
    return x - x.mean((-2, -1), keepdim=True)
