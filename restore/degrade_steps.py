"""Steps of a real-world degradation, each a pure function of a clip: blur, noise, resizing.

A clip is float RGB in [0, 1], (T, 3, h, w), float32 on the CPU. What may drift is given once a frame, as a sequence
of T numbers. The kernels are those of Wang et al., "Real-ESRGAN", ICCVW 2021 (generalised Gaussian and plateau after
Liu et al., "Estimating generalized Gaussian blur kernels for out-of-focus image deblurring", 2020). Equal frames with
equal parameters stay equal: each frame takes the same path through the arithmetic.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from restore.degrade import border_index

KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
RESIZE_MODES = ("area", "bilinear", "bicubic")
_LUMA = (0.299, 0.587, 0.114)  # of BT.601
_PHOTONS = 255  # of a white pixel, at which Poisson noise of scale 1 has the variance of one 8-bit level


def blur_kernel(
    kernel: str, size: int, *, sigma_x: float, sigma_y: float, angle: float = 0.0, beta: float = 1.0
) -> Float[Tensor, "{size} {size}"]:
    """Make a blur kernel that falls with d, the squared distance from its centre in standard deviations.

    Args:
        kernel: one of `KERNELS`. A plain kernel is the Gaussian exp(-d / 2), a generalised one exp(-d^beta / 2), a
            plateau 1 / (1 + d^beta). An "iso" kernel is round: it takes sigma_x for both axes and ignores the angle.
        size: rows and columns, odd.
        sigma_x: standard deviation along the first axis, in pixels, greater than zero.
        sigma_y: the same along the second.
        angle: of the first axis from the rows' direction, in radians.
        beta: shape; 1 makes a generalised kernel Gaussian, more makes it flat inside and steep at the edge.

    Returns:
        (size, size) float32, sum 1, non-negative; a single 1 in the middle for tiny sigmas.

    Raises:
        ValueError: an unknown kernel, an even size or a sigma that is not positive.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is none of {', '.join(KERNELS)}")
    if min(sigma_x, sigma_y) <= 0:
        raise ValueError(f"sigma_x={sigma_x} and sigma_y={sigma_y} must be positive")
    if not kernel.endswith("aniso"):
        sigma_y, angle = sigma_x, 0.0
    x, y = _grid(size)
    along = (math.cos(angle) * x + math.sin(angle) * y) / sigma_x
    across = (math.cos(angle) * y - math.sin(angle) * x) / sigma_y
    distance = along.square() + across.square()
    if kernel.startswith("plateau"):
        values = 1 / (1 + distance**beta)
    else:
        values = torch.exp(-0.5 * (distance**beta if kernel.startswith("generalized") else distance))
    return (values / values.sum()).float()


def motion_kernel(length: float, angle: float) -> Float[Tensor, "size size"]:
    """The path of a point that moves ``length`` pixels straight during the exposure, from the rows' direction.

    The line is sampled every tenth of a pixel, each sample shared by the four pixels around it; sum 1, symmetric, so
    that the picture stays where it is. Length 0 gives a single 1.
    """
    size = 2 * math.ceil(length / 2 + 1) + 1
    kernel = torch.zeros(size, size, dtype=torch.float64)
    middle = size // 2
    for step in torch.linspace(-length / 2, length / 2, 10 * max(round(length), 1) + 1).tolist():
        y, x = middle + step * math.sin(angle), middle + step * math.cos(angle)
        top, left = math.floor(y), math.floor(x)
        down, across = y - top, x - left
        kernel[top, left] += (1 - down) * (1 - across)
        kernel[top, left + 1] += (1 - down) * across
        kernel[top + 1, left] += down * (1 - across)
        kernel[top + 1, left + 1] += down * across
    return (kernel / kernel.sum()).float()


def motion_blur(
    clip: Float[Tensor, "t 3 h w"], *, length: Sequence[float], angle: Sequence[float]
) -> Float[Tensor, "t 3 h w"]:
    """Blur each frame along a line of its own: lengths in pixels, angles in radians."""
    kernels = [motion_kernel(*one) for one in zip(length, angle, strict=True)]
    return torch.stack([_filtered(frame, kernel) for frame, kernel in zip(clip, kernels, strict=True)]).clamp_(0, 1)


def sinc_kernel(size: int, omega: float) -> Float[Tensor, "{size} {size}"]:
    """Make the ideal round low-pass filter, cut off by the kernel's edge: ringing and overshoot, as from sharpening.

    omega: cut-off in radians a pixel, (0, pi]. Returns (size, size) float32, sum 1, with negative lobes. ValueError
    for an even size or another omega.
    """
    if not 0 < omega <= math.pi + 1e-6:
        raise ValueError(f"omega={omega} must be above 0 and at most pi")
    x, y = _grid(size)
    radius = torch.hypot(x, y)
    values = omega * torch.special.bessel_j1(omega * radius) / (2 * math.pi * radius)
    values[size // 2, size // 2] = omega**2 / (4 * math.pi)  # the limit at radius 0
    return (values / values.sum()).float()


def blur(
    clip: Float[Tensor, "t 3 h w"],
    *,
    kernel: str,
    size: int,
    sigma_x: Sequence[float],
    sigma_y: Sequence[float],
    angle: Sequence[float],
    beta: Sequence[float],
) -> Float[Tensor, "t 3 h w"]:
    """Filter each frame with its `blur_kernel`; the border is reflected. ValueError as there."""
    shapes = zip(clip, sigma_x, sigma_y, angle, beta, strict=True)
    return torch.stack(
        [
            _filtered(frame, blur_kernel(kernel, size, sigma_x=sx, sigma_y=sy, angle=turn, beta=b))
            for frame, sx, sy, turn, b in shapes
        ]
    )


def sinc(clip: Float[Tensor, "t 3 h w"], *, size: int, omega: Sequence[float]) -> Float[Tensor, "t 3 h w"]:
    """Filter each frame with its `sinc_kernel`; the border is reflected, the result clamped to [0, 1]."""
    return torch.stack([_filtered(x, sinc_kernel(size, o)) for x, o in zip(clip, omega, strict=True)]).clamp(0, 1)


def resize(clip: Float[Tensor, "t 3 h w"], *, size: Sequence[int], mode: str) -> Float[Tensor, "t 3 H W"]:
    """Resize to size = (H, W) as plain players and apps do, without a filter against aliasing unless mode is "area".

    The edges of both images coincide. The result is clamped to [0, 1]. ValueError for a mode not in `RESIZE_MODES`
    or a size below 1.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"mode={mode!r} is none of {', '.join(RESIZE_MODES)}")
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"size={height}x{width} must be at least 1x1")
    if (height, width) == tuple(clip.shape[2:]):
        return clip
    aligned = None if mode == "area" else False
    return F.interpolate(clip, size=(height, width), mode=mode, align_corners=aligned).clamp(0, 1)


def gaussian_noise(
    clip: Float[Tensor, "t 3 h w"], *, sigma: Sequence[float], gray: bool, seed: int
) -> Float[Tensor, "t 3 h w"]:
    """Add white Gaussian noise, sigma in grey levels (1/255) a frame, and clamp; gray: equal in R, G and B."""

    def noisy(frame: Tensor, level: float, rng: np.random.Generator) -> Tensor:
        noise = rng.standard_normal(_noise_shape(frame, gray), dtype=np.float32)
        return frame + torch.from_numpy(noise) * (level / 255)

    return _each(clip, noisy, sigma, seed)


def poisson_noise(
    clip: Float[Tensor, "t 3 h w"], *, scale: Sequence[float], gray: bool, seed: int
) -> Float[Tensor, "t 3 h w"]:
    """Add shot noise, whose variance is scale^2 x / 255 for a pixel of value x, and clamp.

    gray: equal in R, G and B, made from the luma. 255 photons make white here, where Real-ESRGAN takes the number of
    different values in the image; for natural images of 8 bits both are the same.
    """
    luma = torch.tensor(_LUMA).view(3, 1, 1)

    def noisy(frame: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
        signal = (frame * luma).sum(0, keepdim=True) if gray else frame
        signal = signal.clamp(0, 1) * _PHOTONS
        noise = torch.from_numpy(rng.poisson(signal.numpy()).astype(np.float32)) - signal
        return frame + noise * (strength / _PHOTONS)

    return _each(clip, noisy, scale, seed)


def _each(
    clip: Tensor, noisy: Callable[[Tensor, float, np.random.Generator], Tensor], levels: Sequence[float], seed: int
) -> Tensor:
    """Apply a noise to each frame, with a stream of random numbers that only seed and frame number decide."""
    frames = [
        noisy(frame, level, np.random.default_rng((seed, t)))
        for t, (frame, level) in enumerate(zip(clip, levels, strict=True))
    ]
    return torch.stack(frames).clamp_(0, 1)


def _noise_shape(frame: Tensor, gray: bool) -> tuple[int, int, int]:
    return (1 if gray else 3, frame.shape[1], frame.shape[2])


@functools.lru_cache(maxsize=16)
def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Float64 x and y of a kernel's pixels, both (size, size), with 0 in the middle."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size} of a kernel must be odd and at least 1")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    return axis.expand(size, size), axis.unsqueeze(1).expand(size, size)


def _filtered(frame: Tensor, kernel: Tensor) -> Tensor:
    """Frame (3, h, w) convolved with an odd kernel, through the Fourier domain: several times faster from 9x9 on."""
    reach = kernel.shape[0] // 2
    for dim in (-2, -1):
        size = frame.shape[dim]
        frame = frame.index_select(dim, border_index(torch.arange(-reach, size + reach), size, "reflect"))
    shape = frame.shape[-2:]
    product = torch.fft.rfft2(frame) * torch.fft.rfft2(kernel, s=shape)
    # The kernel's corner lies at the origin, so its middle falls on pixel 2 * reach of the padded frame, our first.
    return torch.fft.irfft2(product, s=shape)[..., 2 * reach :, 2 * reach :]
