"""Spectra of images: Fourier pair, bands, energies, local windows and block DCT; every frequency component uses these.

Conventions, the same everywhere:

- Images are (..., h, w) of any size; a half spectrum is (..., h, w//2+1), complex64, of norm "ortho".
- Frequencies are in cycles/pixel: radius 0..sqrt(0.5), direction modulo pi, because x is real.
- Transforms run in float32 whatever autocast says: half precision exists on some devices only and for powers of two
  only. Spectra are complex64, energies float32, and images that come back float32 unless a dtype is given.
- The Fourier transform is circular. To *estimate* (energies, shifts), subtract the mean and multiply by `hann`; to
  *filter*, `reflect_pad` by the radius of the kernel and crop; to work *locally*, `tapered_windows` and `overlap_add`.
- No grid is cached and no parameter depends on one: grids are small against the maps they are for.

Textbook signal processing throughout, but for the choice of hat functions as bands and for `local_energy`, which are
our own and reproduce no published component.
"""

from collections.abc import Sequence
from itertools import product
from math import pi, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

HIGHEST = sqrt(0.5)  # radius of the corner of the spectrum, cycles/pixel

Device = torch.device | str | None


# ---- the Fourier pair


def rfft2(x: Float[Tensor, "*b h w"]) -> Complex[Tensor, "*b h w//2+1"]:
    """The half spectrum, orthonormal and complex64 for any float dtype and memory format of x."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.fft.rfft2(x.float().contiguous(), norm="ortho")  # channels-last would make rows strided


def irfft2(
    spectrum: Complex[Tensor, "*b h wf"], size: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*b {size[0]} {size[1]}"]:
    """The image of ``size`` (h, w), which a half spectrum does not tell: odd and even widths share a w//2+1.

    A spectrum that no real image has, as learnt filters and products leave it, is welcome: what breaks the symmetry
    X(-ky) = X(ky)* of the columns 0 and w/2 is dropped, on every device.
    """
    with torch.autocast(spectrum.device.type, enabled=False):
        # in two steps, since torch.fft.irfft2 of such a spectrum differs between devices (pytorch issue 154496)
        columns = torch.fft.ifft(spectrum.to(torch.complex64), dim=-2, norm="ortho")
        imaginary = torch.view_as_real(columns)[..., 1]
        imaginary[..., 0] = 0
        if size[1] % 2 == 0:
            imaginary[..., size[1] // 2] = 0
        return torch.fft.irfft(columns, n=size[1], norm="ortho").to(dtype)


def multiplicity(width: int, device: Device = None) -> Float[Tensor, " wf"]:
    """How many columns of the full spectrum each column of the half spectrum stands for: 1 or 2.

    Parseval: ``(multiplicity(w) * rfft2(x).abs()**2).sum() == (x**2).sum()``. Every energy needs it.
    """
    count = torch.full((width // 2 + 1,), 2.0, device=device)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    return count


# ---- frequencies and bands


class Frequencies(NamedTuple):
    """Coordinates of the half spectrum's bins, each (h, w//2+1)."""

    fy: Tensor  # cycles/pixel, -0.5..0.5
    fx: Tensor  # cycles/pixel, 0..0.5
    radius: Tensor  # cycles/pixel, 0..sqrt(0.5)
    angle: Tensor  # 0..pi, of the wave's normal from the x axis towards y; 0 at radius 0


def frequencies(height: int, width: int, device: Device = None) -> Frequencies:
    """Where the bins of `rfft2` lie."""
    fy, fx = torch.meshgrid(
        torch.fft.fftfreq(height, device=device), torch.fft.rfftfreq(width, device=device), indexing="ij"
    )
    return Frequencies(fy, fx, (fy.square() + fx.square()).sqrt(), torch.atan2(fy, fx).remainder(pi))


def radial_bands(height: int, width: int, count: int = 8, device: Device = None) -> Float[Tensor, "k h wf"]:
    """Hats over the radius, centres evenly from 0 to the corner sqrt(0.5); they sum to 1 at every bin."""
    if count < 1:
        raise ValueError(f"{count} radial bands: at least 1 is needed")
    radius = frequencies(height, width, device).radius
    position = (radius * ((count - 1) / HIGHEST)).clamp(max=count - 1)
    return _hats((position - _steps(count, device)).abs())


def polar_bands(
    height: int, width: int, radial: int = 8, angular: int = 8, device: Device = None
) -> Float[Tensor, "k h wf"]:
    """Radial hats times hats over the direction modulo pi; they sum to 1 at every bin.

    Band i * angular + j has the radius of ``radial_bands(...)[i]`` and the direction j * pi / angular. The mean has no
    direction: all sectors share it equally. One sector is all ones, since a single wrapped hat would sum to less.
    """
    rings = radial_bands(height, width, radial, device)
    if angular < 1:
        raise ValueError(f"{angular} angular bands: at least 1 is needed")
    if angular == 1:
        return rings
    grid = frequencies(height, width, device)
    distance = (grid.angle * (angular / pi) - _steps(angular, device)).abs()
    sectors = torch.where(grid.radius == 0, 1 / angular, _hats(torch.minimum(distance, angular - distance)))
    return (rings[:, None] * sectors).flatten(0, 1)


def band_energies(
    spectrum: Complex[Tensor, "*b h wf"], bands: Float[Tensor, "k h wf"], width: int
) -> Float[Tensor, "*b k"]:
    """Mean energy per band of a half spectrum, ``sum m H_k |X|^2 / sum m H_k``, for an image of ``width`` columns.

    White noise of variance v has v in every band. A band that holds no bin, as happens on grids of a few pixels,
    reports the mean energy of all bins: finite under a logarithm, and it scales with the image as the others do.
    """
    count = multiplicity(width, spectrum.device)
    with torch.autocast(spectrum.device.type, enabled=False):
        energy = torch.view_as_real(spectrum).square().sum(-1)
        weights = bands * count
        mass = weights.sum((-2, -1))
        mean = torch.einsum("...hw,khw->...k", energy, weights) / mass.clamp_min(1e-5)
        overall = (energy * count).sum((-2, -1)) / (count.sum() * energy.shape[-2])
        return torch.where(mass > 1e-5, mean, overall[..., None])


def _steps(count: int, device: Device) -> Float[Tensor, "k 1 1"]:
    return torch.arange(count, device=device, dtype=torch.float32)[:, None, None]


def _hats(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min(0)


# ---- windows


def reflect_pad(x: Float[Tensor, "*b h w"], rows: tuple[int, int], columns: tuple[int, int]) -> Float[Tensor, "*b H W"]:
    """Mirror about the edge pixels, (before, after) in each direction, by any amount.

    A picture smaller than the padding, for which `F.pad` fails, is mirrored again and again.
    """
    *batch, h, w = x.shape
    if not any(rows + columns):
        return x
    if max(rows) < h and max(columns) < w:  # several times faster
        x = F.pad(x.reshape(-1, h, w), (*columns, *rows), mode="reflect")
        return x.reshape(*batch, *x.shape[1:])
    return x[..., _mirrored(h, rows, x.device)[:, None], _mirrored(w, columns, x.device)]


def _mirrored(length: int, ends: tuple[int, int], device: torch.device) -> Tensor:
    """Which of ``length`` samples each sample of the reflected line is."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(-ends[0], length + ends[1], device=device).remainder(period)
    return torch.minimum(index, period - index)


def pad_to_multiple(x: Float[Tensor, "*b h w"], multiple: int) -> Float[Tensor, "*b H W"]:
    """Reflect at the bottom and right until both sides divide by ``multiple``; undone by ``[..., :h, :w]``."""
    return reflect_pad(x, (0, -x.shape[-2] % multiple), (0, -x.shape[-1] % multiple))


def hann(height: int, width: int, device: Device = None) -> Float[Tensor, "{height} {width}"]:
    """The Hann window sin^2(pi (n + 1/2) / N) in both directions.

    Sampled at half steps it is symmetric as well as periodic: mirrored pictures give mirrored results, shifts by half
    a window add up to 1, and no sample is 0.
    """
    rows, columns = (
        torch.sin((torch.arange(n, device=device, dtype=torch.float32) + 0.5) * (pi / n)).square()
        for n in (height, width)
    )
    return rows[:, None] * columns


def windows(
    x: Float[Tensor, "*b h w"], size: int = 32, hop: int = 16, *, margin: int = 0
) -> Float[Tensor, "*b nh nw {size} {size}"]:
    """Overlapping square windows, as they are; window (i, j) starts at pixel (i * hop - margin, j * hop - margin).

    The picture is reflected by ``margin`` on all sides and, at the bottom and right, to the end of the last window.
    Without margin, a picture of one window's size is one window. Raises ValueError unless size divides by hop.
    """
    if hop < 1 or size % hop:
        raise ValueError(f"windows of size={size} px do not divide by hop={hop} px")
    ends = [-max(n + 2 * margin - size, 0) % hop + max(size - n - 2 * margin, 0) for n in x.shape[-2:]]
    x = reflect_pad(x, (margin, margin + ends[0]), (margin, margin + ends[1]))
    return x.unfold(-2, size, hop).unfold(-2, size, hop)


def tapered_windows(
    x: Float[Tensor, "*b h w"], size: int = 32, hop: int = 16
) -> Float[Tensor, "*b nh nw {size} {size}"]:
    """Analysis: float32 windows times sqrt-Hann, so many around the picture that `overlap_add` restores all of it.

    Every pixel lies in (size / hop)^2 windows. Raises ValueError unless size divides by hop at least twice.
    """
    _check_overlap(size, hop)
    return windows(x.float(), size, hop, margin=size - hop) * hann(size, size, x.device).sqrt()


def overlap_add(
    parts: Float[Tensor, "*b nh nw s s"], size: Sequence[int], hop: int = 16, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*b {size[0]} {size[1]}"]:
    """Synthesis: the picture of ``size`` (h, w) of which `tapered_windows` made ``parts``, whatever they went through.

    The windows are tapered again before they are added; left as they are, they give the picture back.
    """
    rows, columns, side = parts.shape[-4:-1]
    _check_overlap(side, hop)
    overlap = side // hop
    expected = tuple(-(-n // hop) + overlap - 1 for n in size)
    if (rows, columns) != expected:
        raise ValueError(f"{rows}x{columns} windows, but a picture of {size[0]}x{size[1]} px has {expected}")
    gain = (2 / overlap) ** 2  # shifted Hann windows add up to overlap / 2 in each direction
    parts = parts.float() * (gain * hann(side, side, parts.device).sqrt())
    blocks = parts.unflatten(-1, (overlap, hop)).unflatten(-3, (overlap, hop))  # windows in blocks of a hop
    whole = torch.zeros((), device=parts.device)
    for i, j in product(range(overlap), repeat=2):  # the block (i, j) of each window; those in the margin are left out
        shifted = blocks[..., overlap - 1 - i : rows - i, overlap - 1 - j : columns - j, i, :, j, :]
        whole = whole + shifted  # (..., h/hop, w/hop, hop, hop)
    whole = whole.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return whole[..., : size[0], : size[1]].to(dtype)


def local_energy(
    x: Float[Tensor, "b c h w"], size: int = 8, hop: int = 4, above: float = 0.125, floor: float = 1e-6
) -> Float[Tensor, "b 1 h w"]:
    """Where a picture or feature map is sharp: log of its mean energy at radii > ``above`` cycles/pixel, float32.

    Energies of Hann windows of ``size`` px every ``hop`` px, averaged over channels and interpolated to the grid of x.
    White noise of variance v gives about log v; flat parts give log ``floor``. Ours (`hf_energy_map` of the
    project's design). Raises ValueError for windows that are not centred on hops or an ``above`` past the corner.
    """
    _check_overlap(size, hop)
    if (size - hop) % 2 or not 0 <= above < HIGHEST:
        raise ValueError(f"local energy needs an even size - hop={size - hop} px and 0 <= above={above} < sqrt(0.5)")
    with torch.autocast(x.device.type, enabled=False):
        parts = windows(x.float(), size, hop, margin=(size - hop) // 2).flatten(-2)  # (B, C, h/hop, w/hop, size^2)
        energy = (parts @ _high_frequencies(size, above, x.device)).square().sum(-1).mean(1, keepdim=True)
        coarse = (energy + floor).log()
        # thanks to the margin the centres of the windows are the half-pixel centres of the coarse grid
        fine = F.interpolate(coarse, scale_factor=hop, mode="bilinear", align_corners=False)
    return fine[..., : x.shape[-2], : x.shape[-1]]


def _high_frequencies(size: int, above: float, device: torch.device) -> Float[Tensor, "n f"]:
    """What takes the pixels of a window to numbers whose squares sum to its mean energy at radii > ``above``.

    One product instead of mean, taper and FFT: about three times faster, as FFTs of 8x8 are mostly overhead.
    """
    pixels = torch.eye(size * size, device=device).unflatten(1, (size, size))
    taper = hann(size, size, device)
    spectra = rfft2((pixels - pixels.mean((-2, -1), keepdim=True)) * taper)
    weights = (frequencies(size, size, device).radius > above) * multiplicity(size, device)
    weights = weights / (weights.sum() * taper.square().mean())
    return torch.view_as_real(spectra * weights.sqrt()).flatten(1)


def _check_overlap(size: int, hop: int) -> None:
    if hop < 1 or size % hop or size < 2 * hop:
        raise ValueError(f"windows of size={size} px must divide by hop={hop} px at least twice")


# ---- block DCT


def dct_matrix(size: int = 8, device: Device = None) -> Float[Tensor, "{size} {size}"]:
    """The orthonormal DCT-II: row k is the cosine of k/2 periods; coefficients are ``C @ x``, the inverse ``C.T @``."""
    k = torch.arange(size, device=device)
    turns = k[:, None] * (2 * k + 1) % (4 * size)  # in 1/(4 size); reduced as integers, which is exact
    matrix = sqrt(2 / size) * torch.cos(turns * (pi / (2 * size)))
    return torch.where(k[:, None] == 0, sqrt(1 / size), matrix)


def block_dct(x: Float[Tensor, "b c h w"], size: int = 8) -> Float[Tensor, "b n h//{size} w//{size}"]:
    """Orthonormal DCT-II of blocks: (B, C, size*h, size*w) -> (B, C*size^2, h, w), the channel c*size^2 + u*size + v.

    As JPEG's before quantisation, in natural (row-major) order of the vertical frequency u and the horizontal v. On
    the scale 0..255 shifted by -128, a flat 200 has a mean coefficient (u = v = 0) of 576. Raises ValueError for
    sizes that do not divide: `pad_to_multiple` first.
    """
    if x.shape[-2] % size or x.shape[-1] % size:
        raise ValueError(f"{x.shape[-2]}x{x.shape[-1]} px do not divide into blocks of {size}: pad_to_multiple first")
    matrix = dct_matrix(size, x.device)
    with torch.autocast(x.device.type, enabled=False):  # products, not a strided convolution, which may round to TF32
        blocks = x.float().unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (B, C, h, size, w, size)
        return torch.einsum("ui,vj,bchiwj->bcuvhw", matrix, matrix, blocks).flatten(1, 3).to(x.dtype)


def block_idct(coefficients: Float[Tensor, "b n h w"], size: int = 8) -> Float[Tensor, "b c {size}*h {size}*w"]:
    """The inverse of `block_dct`: (B, C*size^2, h, w) -> (B, C, size*h, size*w)."""
    if coefficients.shape[1] % size**2:
        raise ValueError(f"{coefficients.shape[1]} channels are no whole number of {size}x{size} DCT blocks")
    matrix = dct_matrix(size, coefficients.device)
    with torch.autocast(coefficients.device.type, enabled=False):
        parts = coefficients.float().unflatten(1, (-1, size, size))  # (B, C, u, v, h, w)
        blocks = torch.einsum("ui,vj,bcuvhw->bchiwj", matrix, matrix, parts)
        return blocks.flatten(-2).flatten(2, 3).to(coefficients.dtype)
