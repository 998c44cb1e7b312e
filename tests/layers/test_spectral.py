"""Laws of spectra, bands, windows and block DCT, with NumPy and SciPy as referees."""

import json
import math

import numpy as np
import pytest
import scipy.fft
import torch
from tiny import run_python, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers import spectral
from archs.layers.spectral import (
    band_energies,
    block_dct,
    block_idct,
    dct_matrix,
    frequencies,
    hann,
    irfft2,
    local_energy,
    multiplicity,
    overlap_add,
    pad_to_multiple,
    polar_bands,
    radial_bands,
    reflect_pad,
    rfft2,
    tapered_windows,
    windows,
)

SIZES = [(32, 32), (33, 47), (45, 79), (180, 320)]
every_size = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
tiny_sizes = pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (4, 3), (6, 8)], ids="{0[0]}x{0[1]}".format)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(height: int, width: int, fy: float, fx: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return torch.cos(2 * math.pi * (fy * rows + fx * columns) + 0.3)


# ---- the Fourier pair


@every_size
def test_parseval(size):
    x = noise(2, 3, *size)
    energy = (multiplicity(size[1]) * rfft2(x).abs().square()).double().sum()
    assert abs(energy / x.double().square().sum() - 1) < 1e-6


@every_size
@pytest.mark.parametrize("lead", [(), (2,), (2, 1, 3)], ids=str)
def test_there_and_back(size, lead):
    x = noise(*lead, *size)
    spectrum = rfft2(x)
    assert spectrum.shape == (*lead, size[0], size[1] // 2 + 1) and spectrum.dtype == torch.complex64
    assert_close(irfft2(spectrum, size), x, atol=5e-6, rtol=0)


@tiny_sizes
def test_there_and_back_on_a_few_pixels(size):
    x = noise(2, *size)
    assert_close(irfft2(rfft2(x), size), x, atol=5e-6, rtol=0)
    assert multiplicity(size[1]).sum() == size[1]


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (1, 4), (6, 1), (2, 2)])
def test_a_spectrum_that_no_image_has(size):
    """What breaks the symmetry has no effect, as in NumPy, and takes no gradient."""
    spectrum = torch.view_as_complex(noise(*size[:1], size[1] // 2 + 1, 2)).requires_grad_()
    x = irfft2(spectrum, size)
    expected = np.fft.irfft2(spectrum.detach().numpy(), s=size, norm="ortho")
    assert_close(x.detach(), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)
    x.square().sum().backward()
    assert spectrum.grad[0, 0].imag == 0
    assert_close(irfft2(rfft2(x.detach()), size), x.detach(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_spectra_are_float32(dtype):
    x = noise(2, 3, 9, 14).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = rfft2(x)
        result = irfft2(spectrum, (9, 14), dtype)
    assert torch.equal(spectrum, rfft2(x.float()))
    assert result.dtype == dtype
    assert_close(result, x, atol=5e-6, rtol=torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6)


def test_channels_last_makes_no_difference():
    x = noise(2, 8, 12, 10)
    spectrum = rfft2(x.to(memory_format=torch.channels_last))
    assert torch.equal(spectrum, rfft2(x)) and spectrum.is_contiguous()


# ---- frequencies and bands


@pytest.mark.parametrize("size", [(24, 40), (33, 47)])
@pytest.mark.parametrize(("ky", "kx"), [(0, 3), (5, 0), (5, 7), (-5, 7)])
def test_a_wave_is_where_the_coordinates_say(size, ky, kx):
    fy, fx = ky / size[0], kx / size[1]
    energy = rfft2(wave(*size, fy, fx)).abs()
    grid = frequencies(*size)
    peak = (energy == energy.max()).nonzero()[0].tolist()
    y, x, radius, angle = (float(part[tuple(peak)]) for part in grid)
    sign = -1 if kx == 0 and y * fy < 0 else 1  # on the column 0 a wave has both signs
    assert (sign * y, x) == pytest.approx((fy, fx), abs=1e-6)
    assert radius == pytest.approx(math.hypot(fy, fx), abs=1e-6)
    assert angle == pytest.approx(math.atan2(fy, fx) % math.pi, abs=1e-6)


@every_size
@pytest.mark.parametrize(("radial", "angular"), [(8, 8), (8, 1), (1, 1), (1, 3), (5, 2), (16, 4)])
def test_bands_sum_to_one(size, radial, angular):
    bands = polar_bands(*size, radial, angular)
    assert bands.shape == (radial * angular, size[0], size[1] // 2 + 1)
    assert bands.min() >= 0
    assert (bands.sum(0) - 1).abs().max() < 1e-6


@every_size
def test_polar_bands_refine_radial_ones(size):
    rings = radial_bands(*size, 6)
    sectors = polar_bands(*size, 6, 4).unflatten(0, (6, 4))
    assert_close(sectors.sum(1), rings, atol=1e-6, rtol=0)
    assert_close(sectors[0, :, 0, 0], torch.full((4,), 0.25))  # the mean has no direction
    assert torch.equal(polar_bands(*size, 6, 1), rings)


def test_bands_lie_around_their_centres():
    """A wave in the middle of a band is in no other, whatever its sense."""
    radius, step = 3 * math.sqrt(0.5) / 7, math.pi / 8
    for j in range(8):
        fy, fx = radius * math.sin(j * step), radius * math.cos(j * step)
        for sense in (1, -1):
            x = wave(256, 256, sense * fy, sense * fx) * hann(256, 256)
            energies = (rfft2(x).abs().square() * polar_bands(256, 256)).sum((-2, -1))
            assert energies.argmax() == 3 * 8 + j
            assert energies[3 * 8 + j] > 0.9 * energies.sum()


def test_directions_wrap():
    """Just below and just above the x axis is the same sector, shared with either neighbour."""
    bands = polar_bands(256, 256, 1, 8)
    above, below = bands[:, 2, 100], bands[:, -2, 100]
    assert_close(above[0], below[0])
    assert_close(above[1], below[7])
    assert above[0] > 0.8 and above[1] > 0 and below[1] == 0


@pytest.mark.parametrize("size", [(16, 12), (15, 13)])
def test_band_energies_by_definition(size):
    """The mean of |X|^2 over the whole spectrum, weighted by the band."""
    x = noise(2, 3, *size)
    fy, fx = torch.meshgrid(torch.fft.fftfreq(size[0]), torch.fft.fftfreq(size[1]), indexing="ij")
    position = (fy.square() + fx.square()).sqrt() * 4 / math.sqrt(0.5)
    power = torch.fft.fft2(x, norm="ortho").abs().square()
    for k, energy in enumerate(band_energies(rfft2(x), radial_bands(*size, 5), size[1]).unbind(-1)):
        hat = (1 - (position - k).abs()).clamp_min(0)
        assert_close(energy, (hat * power).sum((-2, -1)) / hat.sum(), atol=1e-5, rtol=1e-5)


@every_size
def test_white_noise_has_its_variance_in_every_band(size):
    x = 3 * noise(64, *size)
    energies = band_energies(rfft2(x), radial_bands(*size), size[1]).mean(0)
    assert_close(energies, torch.full((8,), 9.0), rtol=0.15, atol=0)


@tiny_sizes
def test_bands_without_a_bin(size):
    """Finite, positive, and proportional to the energy of the image as every other band."""
    x = noise(2, *size) + 1
    bands = polar_bands(*size, 8, 8)
    energies = band_energies(rfft2(x), bands, size[1])
    assert (bands.sum((-2, -1)) == 0).any()
    assert energies.isfinite().all() and (energies > 0).all()
    assert_close(band_energies(rfft2(5 * x), bands, size[1]), 25 * energies)


def test_band_energies_under_autocast():
    x = noise(2, 3, 20, 21)
    expected = band_energies(rfft2(x), radial_bands(20, 21), 21)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(band_energies(rfft2(x), radial_bands(20, 21), 21), expected)


def test_at_least_one_band():
    with pytest.raises(ValueError, match="0 radial bands"):
        radial_bands(8, 8, 0)
    with pytest.raises(ValueError, match="0 angular bands"):
        polar_bands(8, 8, 2, 0)


# ---- windows


@pytest.mark.parametrize("n", [8, 32, 7])
def test_hann(n):
    window = hann(n, 4)
    assert_close(window, window.flip(0))
    assert window.min() > 0 and window.max() <= 1
    if n % 2 == 0:
        assert_close(window + window.roll(n // 2, 0), hann(1, 4).expand(n, 4))


@pytest.mark.parametrize("rows", [(0, 0), (3, 1), (6, 6), (20, 9)], ids=str)
@pytest.mark.parametrize("columns", [(0, 0), (0, 4), (8, 8), (31, 9)], ids=str)
@pytest.mark.parametrize("lead", [(), (2, 1, 3)], ids=str)
def test_reflection_by_any_amount(rows, columns, lead):
    x = noise(*lead, 7, 9)
    expected = np.pad(x.numpy(), [(0, 0)] * len(lead) + [rows, columns], mode="reflect")
    assert torch.equal(reflect_pad(x, rows, columns), torch.from_numpy(expected))


def test_one_pixel_is_repeated():
    assert torch.equal(reflect_pad(torch.tensor([[2.0]]), (1, 2), (3, 0)), torch.full((4, 4), 2.0))


@pytest.mark.parametrize(("size", "padded"), [((8, 16), (8, 16)), ((9, 15), (16, 16)), ((3, 1), (8, 8))])
def test_pad_to_multiple(size, padded):
    x = noise(2, 3, *size)
    result = pad_to_multiple(x, 8)
    assert result.shape[-2:] == padded
    assert torch.equal(result[..., : size[0], : size[1]], x)


@pytest.mark.parametrize("margin", [0, 2, 12])
def test_windows_are_cut_where_they_say(margin):
    x = noise(2, 21, 34)
    cut = windows(x, 16, 4, margin=margin)
    padded = reflect_pad(x, (margin, margin + 16), (margin, margin + 16))
    for i in range(cut.shape[1]):
        for j in range(cut.shape[2]):
            assert torch.equal(cut[:, i, j], padded[:, 4 * i : 4 * i + 16, 4 * j : 4 * j + 16]), (i, j)
    for n, count in zip((21, 34), cut.shape[1:3], strict=True):  # the last window, and no window after it, is needed
        assert 4 * (count - 2) + 16 < n + 2 * margin <= 4 * (count - 1) + 16


def test_a_crop_of_one_window_is_one_window():
    x = noise(1, 3, 32, 32)
    assert torch.equal(windows(x)[:, :, 0, 0], x) and windows(x).shape == (1, 3, 1, 1, 32, 32)
    assert windows(x[..., :5, :7]).shape == (1, 3, 1, 1, 32, 32)


@every_size
@pytest.mark.parametrize(("side", "hop"), [(32, 16), (16, 8), (8, 4), (8, 2), (12, 4)])
def test_perfect_reconstruction(size, side, hop):
    x = noise(2, *size)
    assert_close(overlap_add(tapered_windows(x, side, hop), size, hop), x, atol=5e-6, rtol=0)


@tiny_sizes
def test_perfect_reconstruction_of_a_few_pixels(size):
    x = noise(2, 1, 3, *size)
    assert_close(overlap_add(tapered_windows(x), size), x, atol=5e-6, rtol=0)


def test_windows_filtered_alike_filter_the_image_alike():
    """Halving every window's spectrum halves the picture; bf16 in, bf16 out on request."""
    x = noise(1, 2, 45, 79)
    spectra = rfft2(tapered_windows(x.bfloat16()))
    result = overlap_add(irfft2(0.5 * spectra, (32, 32)), (45, 79), dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert_close(result.float(), 0.5 * x, rtol=0.02, atol=1e-4)


def test_windows_that_do_not_fit():
    x = noise(32, 32)
    with pytest.raises(ValueError, match="size=32 px do not divide by hop=12"):
        windows(x, 32, 12)
    for call in (lambda: tapered_windows(x, 8, 8), lambda: overlap_add(noise(4, 4, 8, 8), (32, 32), 8)):
        with pytest.raises(ValueError, match="at least twice"):
            call()
    with pytest.raises(ValueError, match=r"3x3 windows, but a picture of 33x32 px has \(4, 3\)"):
        overlap_add(tapered_windows(x), (33, 32))


# ---- local energy


@pytest.mark.parametrize(("size", "hop", "above"), [(8, 4, 0.125), (8, 2, 0.3), (16, 8, 0)])
def test_local_energy_by_definition(size, hop, above):
    """Window, mean, taper, spectrum, mean over bins and channels, logarithm, interpolation: one after the other."""
    x = noise(2, 3, 24, 40)
    parts = windows(x, size, hop, margin=(size - hop) // 2)
    taper = hann(size, size)
    spectrum = rfft2((parts - parts.mean((-2, -1), keepdim=True)) * taper)
    high = (frequencies(size, size).radius > above).float()[None]
    energy = band_energies(spectrum, high, size)[..., 0].mean(1, keepdim=True) / taper.square().mean()
    expected = F.interpolate((energy + 1e-6).log(), x.shape[-2:], mode="bilinear")
    assert_close(local_energy(x, size, hop, above), expected, atol=1e-4, rtol=0)


@every_size
@pytest.mark.parametrize(("dy", "dx"), [(4, 8), (12, 4)])
def test_local_energy_moves_with_the_image(size, dy, dx):
    """Two crops of one scene, a multiple of the hop apart, agree but for what their borders reflect."""
    h, w = size
    scene = noise(1, 3, h + dy, w + dx)
    one, other = local_energy(scene[..., :h, :w]), local_energy(scene[..., dy:, dx:])
    assert one.shape == (1, 1, h, w)
    inside = (..., slice(8, h - dy - 8), slice(8, w - dx - 8))
    assert_close(other[inside], one[..., dy:, dx:][inside], atol=1e-5, rtol=0)


def test_local_energy_falls_only_where_blurred():
    x = noise(1, 2, 64, 96)
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (taps[:, None] * taps).expand(2, 1, 5, 5)
    blurred = torch.cat([x[..., :48], F.conv2d(x, kernel, padding=2, groups=2)[..., 48:]], dim=-1)
    change = local_energy(blurred) - local_energy(x)
    assert change[..., :38].abs().max() == 0
    assert change[..., 58:-8].max() < -1


def test_local_energy_of_noise_and_of_nothing():
    x = torch.cat([2 * noise(1, 16, 64, 64), torch.full((1, 16, 64, 64), 200.0)], dim=-1)
    energy = local_energy(x)
    assert energy.dtype == torch.float32
    assert abs(energy[..., :56].mean() - math.log(4)) < 0.1
    assert_close(energy[..., 72:], torch.full((1, 1, 64, 56), math.log(1e-6)), atol=0.05, rtol=0)


def test_gain_adds_to_local_energy():
    x = noise(1, 3, 33, 47)
    assert_close(local_energy(4 * x), local_energy(x) + 2 * math.log(4), atol=1e-3, rtol=0)


def test_local_energy_in_half_precision_and_backward():
    x = noise(1, 3, 33, 47).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        energy = local_energy(x)
    assert torch.equal(energy, local_energy(x.float()))
    energy.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    flat = torch.zeros(1, 1, 16, 16, requires_grad=True)
    local_energy(flat).sum().backward()
    assert not flat.grad.any()


def test_local_energy_says_what_it_needs():
    x = noise(1, 1, 16, 16)
    for arguments, rule in [((8, 8), "at least twice"), ((9, 3, 0.8), "above=0.8"), ((6, 3), "even size - hop=3")]:
        with pytest.raises(ValueError, match=rule):
            local_energy(x, *arguments)


# ---- block DCT


@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_dct_matrix_is_orthonormal(size):
    matrix = dct_matrix(size)
    assert_close(matrix @ matrix.T, torch.eye(size), atol=5e-7, rtol=0)
    expected = scipy.fft.dct(np.eye(size), axis=0, norm="ortho")
    assert_close(matrix, torch.from_numpy(expected).float(), atol=3e-7, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (4, 6), (22, 40)])
def test_block_dct_and_back(h, w):
    x = noise(2, 3, 8 * h, 8 * w)
    coefficients = block_dct(x)
    assert coefficients.shape == (2, 192, h, w)
    assert_close(coefficients.double().square().sum(), x.double().square().sum())
    assert_close(block_idct(coefficients), x, atol=5e-6, rtol=0)


def test_block_dct_order():
    """Channel after channel, vertical frequency after vertical frequency, as SciPy transforms each block."""
    x = noise(1, 2, 16, 24)
    coefficients = block_dct(x)
    for c, i, j in [(0, 0, 0), (1, 0, 2), (1, 1, 1)]:
        block = x[0, c, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
        expected = torch.from_numpy(scipy.fft.dctn(block, norm="ortho")).flatten()
        assert_close(coefficients[0, 64 * c : 64 * c + 64, i, j], expected, atol=2e-6, rtol=1e-5)


def test_block_dct_is_a_strided_convolution():
    x = noise(2, 3, 24, 32)
    kernels = torch.einsum("ui,vj->uvij", dct_matrix(), dct_matrix()).reshape(64, 1, 8, 8)
    expected = F.conv2d(x, kernels.repeat(3, 1, 1, 1), stride=8, groups=3)
    assert_close(block_dct(x), expected, atol=3e-6, rtol=0)


def test_a_flat_block():
    """As in JPEG: 8 * (200 - 128) in the mean, nothing elsewhere."""
    coefficients = block_dct(torch.full((1, 1, 8, 8), 200.0) - 128).flatten()
    assert coefficients[0] == pytest.approx(576, abs=1e-3)
    assert coefficients[1:].abs().max() < 2e-4


def test_block_dct_in_half_precision():
    x = noise(1, 3, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = block_dct(x)
        back = block_idct(coefficients)
    assert coefficients.dtype == back.dtype == torch.bfloat16
    assert torch.equal(coefficients, block_dct(x.float()).bfloat16())
    assert_close(back, x, atol=0.03, rtol=0.02)


def test_blocks_that_do_not_fit():
    with unchecked():
        with pytest.raises(ValueError, match="12x16 px do not divide into blocks of 8"):
            block_dct(noise(1, 3, 12, 16))
        with pytest.raises(ValueError, match="100 channels are no whole number of 8x8"):
            block_idct(noise(1, 100, 2, 2))


# ---- graphs, in a fresh interpreter: enforced annotations would break them


def everything(x: Tensor) -> list[Tensor]:
    size = x.shape[-2:]
    local = overlap_add(irfft2(rfft2(tapered_windows(x)), (32, 32)), size)
    energies = band_energies(rfft2(x), polar_bands(*size, 4, 4), size[1])
    back = block_idct(block_dct(pad_to_multiple(x, 8)))
    return [local, energies, back, local_energy(x), irfft2(rfft2(x) * radial_bands(*size)[1], size)]


class Everything(torch.nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return everything(x)


def report_graphs() -> None:
    """Print the largest difference that compiling, with gradients, and exporting make."""
    x, report = noise(1, 2, 13, 18), {}
    for tool in ("compile", "export"):
        fresh = x.clone().requires_grad_(tool == "compile")
        module = Everything()
        if tool == "compile":
            convert = torch.compile(module, fullgraph=True, backend="aot_eager")
        else:
            convert = torch.export.export(module, (fresh,)).module()
        results = convert(fresh)
        pairs = list(zip(results, everything(x), strict=True))
        if tool == "compile":
            sum(result.sum() for result in results).backward()
            reference = x.clone().requires_grad_()
            sum(result.sum() for result in everything(reference)).backward()
            pairs.append((fresh.grad, reference.grad))
        report[tool] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    print(json.dumps(report))


def test_one_graph_without_break_gives_the_same_numbers():
    done = run_python("from layers.test_spectral import report_graphs; report_graphs()")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"compile", "export"} and max(report.values()) < 1e-4, report


def test_every_public_function_is_tested_here():
    public = {name for name, thing in vars(spectral).items() if getattr(thing, "__module__", "") == spectral.__name__}
    assert {name for name in public if name[0] != "_" and name != "Frequencies"} <= set(globals())
