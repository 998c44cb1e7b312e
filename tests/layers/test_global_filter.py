"""Filters of the whole image: identity at the start, the same filter on every grid, precisions, weights, graphs."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from tiny import run_python
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers.global_filter import GlobalFilter, GlobalFilterBlock, PolarFilter, RadialFilter, SpectralFilter
from archs.layers.spectral import radial_bands, reflect_pad, rfft2

SIZES = [(32, 32), (33, 47), (45, 79), (180, 320)]
every_size = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)

FILTERS: dict[str, Callable[..., SpectralFilter]] = {
    "radial": lambda **options: RadialFilter(3, 8, **options),
    "polar": lambda **options: PolarFilter(3, 4, 6, **options),
    "global": lambda **options: GlobalFilter(3, 32, 32, **options),
    "global, odd": lambda **options: GlobalFilter(3, 15, 21, **options),
    "global, bicubic": lambda **options: GlobalFilter(3, 32, 32, resize="bicubic", **options),
}
every_filter = pytest.mark.parametrize("name", FILTERS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learnt(name: str, **options) -> SpectralFilter:
    """A filter that changes the image by about as much as there is of it."""
    spectral_filter = FILTERS[name](**options)
    with torch.no_grad():
        spectral_filter.weight.copy_(0.5 * noise(*spectral_filter.weight.shape, seed=1))
    return spectral_filter.requires_grad_(False)


def kernel_filter(kernel: Tensor, resize: str = "kernel") -> GlobalFilter:
    """The filter that convolves one channel with ``kernel`` (h, w), displacement 0 in h//2, w//2."""
    response = torch.fft.rfft2(torch.fft.ifftshift(kernel))
    spectral_filter = GlobalFilter(1, *kernel.shape, resize=resize).requires_grad_(False)
    spectral_filter.weight.copy_(torch.view_as_real(response - 1)[None])
    return spectral_filter


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """The circular convolution of each plane with ``kernel`` (h, w), displacement 0 in h//2, w//2."""
    h, w = kernel.shape
    rows, columns = ((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2)  # how far a flipped kernel reaches
    period = [torch.arange(-a, n + b) % n for n, (a, b) in zip(x.shape[-2:], (rows, columns), strict=True)]
    wide = x[..., period[0][:, None], period[1]]
    return F.conv2d(wide.flatten(0, 1)[:, None], kernel.flip(0, 1)[None, None]).view_as(x)


def decaying(height: int, width: int, reach_px: float) -> Tensor:
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    return noise(height, width) * torch.exp(-torch.hypot(rows[:, None].float(), columns.float()) / reach_px)


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


# ---- identity at the start


@every_filter
@every_size
@pytest.mark.parametrize("padding", [0, 9])
def test_a_fresh_filter_changes_nothing(name, size, padding):
    x = noise(2, 3, *size)
    spectral_filter = FILTERS[name](padding=padding)
    assert torch.equal(spectral_filter(x), x)
    half = x.bfloat16()
    assert torch.equal(spectral_filter(half), half)


@every_filter
def test_a_fresh_filter_learns_at_once(name):
    spectral_filter = FILTERS[name]()
    x = noise(2, 3, 20, 27).requires_grad_()
    (spectral_filter(x) * noise(2, 3, 20, 27, seed=2)).sum().backward()
    assert spectral_filter.weight.grad.isfinite().all()
    assert (spectral_filter.weight.grad != 0).float().mean() > 0.8
    assert x.grad.isfinite().all()


# ---- one filter, every grid


@every_size
@pytest.mark.parametrize("kernel_size", [(32, 32), (15, 21), (8, 9)])
def test_a_resized_filter_is_the_same_convolution(size, kernel_size):
    kernel = decaying(*kernel_size, 3)
    kernel /= kernel.abs().sum()
    x = noise(1, 1, *size)
    assert (kernel_filter(kernel)(x) - convolve(x, kernel)).abs().max() < 1e-5


def test_resizing_the_kernel_is_exact_and_bicubic_is_not():
    """A dense kernel learnt at 32x32 and used at 180x320: the effect is off by .43 with GFNet's interpolation."""
    kernel = decaying(32, 32, 6)
    x = noise(1, 1, 180, 320)
    expected = convolve(x, kernel)
    assert relative(kernel_filter(kernel)(x), expected) < 1e-5
    assert 0.35 < relative(kernel_filter(kernel, "bicubic")(x), expected) < 0.5


@pytest.mark.parametrize("resize", ["kernel", "bicubic"])
def test_on_its_own_grid_nothing_is_resized(resize):
    kernel = decaying(32, 32, 6) / 30
    x = noise(1, 1, 32, 32)
    assert_close(kernel_filter(kernel, resize)(x), convolve(x, kernel), atol=1e-5, rtol=0)


def test_a_smaller_grid_crops_the_kernel():
    """Taps within half the grid stay what they are, those farther out are lost."""
    kernel = decaying(32, 32, 2)
    x = noise(1, 1, 12, 13)
    assert_close(kernel_filter(kernel)(x), convolve(x, kernel[10:22, 10:23]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["radial", "polar", "global", "global, odd"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_tiles_of_a_periodic_image(name, size):
    spectral_filter, x = learnt(name), noise(1, 3, *size)
    whole = spectral_filter(x.repeat(1, 1, 2, 2))
    expected = spectral_filter(x).repeat(1, 1, 2, 2)
    assert (whole - expected).abs().max() < 1e-5


def test_the_mean_is_the_gain_at_frequency_zero():
    spectral_filter = learnt("radial")
    result = spectral_filter(torch.ones(1, 3, 33, 47))
    expected = (1 + spectral_filter.weight[:, 0])[:, None, None].expand(3, 33, 47)
    assert_close(result[0], expected, atol=1e-5, rtol=0)


def test_a_polar_filter_sees_directions_and_a_radial_one_does_not():
    polar = PolarFilter(1, 1, 4).requires_grad_(False)
    polar.weight[0, 0] = -1  # takes away waves along x
    columns = torch.cos(2 * torch.pi * torch.arange(40) * 0.2).expand(1, 1, 40, 40)
    rows = columns.transpose(2, 3).contiguous()
    assert polar(columns).abs().max() < 1e-5
    assert_close(polar(rows), rows, atol=1e-5, rtol=0)
    radial = RadialFilter(1).requires_grad_(False)
    radial.weight[:] = noise(1, 8)
    assert_close(radial(rows), radial(columns).transpose(2, 3), atol=1e-5, rtol=0)


# ---- linear, shift-invariant


@every_filter
@every_size
def test_shifts_and_sums_commute_with_filters(name, size):
    spectral_filter, x, y = learnt(name), noise(1, 3, *size), noise(1, 3, *size, seed=5)
    result = spectral_filter(x)
    assert_close(spectral_filter(x.roll((5, -7), (2, 3))), result.roll((5, -7), (2, 3)), atol=2e-5, rtol=0)
    assert_close(spectral_filter(2 * x - y), 2 * result - spectral_filter(y), atol=5e-5, rtol=0)


def test_padding_keeps_opposite_edges_apart():
    x = torch.zeros(1, 3, 40, 48)
    x[..., -1] = 1
    wrapped, padded = learnt("radial"), learnt("radial", padding=16)
    assert wrapped(x)[..., 0].abs().min() > 0.05
    assert padded(x)[..., 0].abs().max() < 0.02
    reflected = wrapped(reflect_pad(x, (16, 16), (16, 16)))[..., 16:-16, 16:-16]
    assert_close(padded(x), reflected, atol=2e-6, rtol=0)


# ---- precisions, weights, what is kept


@every_filter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    spectral_filter, x = learnt(name), noise(1, 3, 45, 79).to(dtype)
    expected = spectral_filter(x.float())
    for result in (spectral_filter(x), spectral_filter.to(dtype)(x)):
        assert result.dtype == dtype and result.isfinite().all()
        assert relative(result.float(), expected) < 0.01


@every_filter
def test_autocast_changes_nothing(name):
    spectral_filter, x = learnt(name), noise(1, 3, 33, 47)
    with torch.autocast("cpu", torch.bfloat16):
        result = spectral_filter(x)
    assert torch.equal(result, spectral_filter(x))


@pytest.mark.gpu
@every_filter
def test_half_precision_on_a_gpu(name):
    """Sizes that are no powers of two, which half-precision FFTs refuse; the CPU's numbers."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spectral_filter, x = learnt(name), noise(1, 3, 45, 80)
    expected = spectral_filter(x)
    spectral_filter, x = spectral_filter.cuda(), x.cuda()
    assert_close(spectral_filter(x).cpu(), expected, atol=2e-5, rtol=0)
    with torch.autocast("cuda", torch.float16):
        result = spectral_filter(x.half())
    assert result.dtype == torch.float16
    assert relative(result.float().cpu(), expected) < 0.01


@every_filter
def test_weights_are_plain_floats_that_survive(name):
    spectral_filter, x = learnt(name), noise(1, 3, 33, 47)
    state = spectral_filter.state_dict()
    assert list(state) == ["weight"] and state["weight"].dtype == torch.float32
    fresh = FILTERS[name]()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), spectral_filter(x))


@every_filter
def test_what_is_kept_in_evaluation_follows_the_weight(name):
    spectral_filter, x = learnt(name).eval(), noise(1, 3, 20, 27)
    state = {"weight": noise(*spectral_filter.weight.shape, seed=3)}
    calls = []
    counted = spectral_filter.delta
    spectral_filter.delta = lambda *size: calls.append(size) or counted(*size)

    def expected() -> Tensor:
        return copy.deepcopy(spectral_filter).train()(x)

    with torch.no_grad():
        first = spectral_filter(x)
        assert torch.equal(spectral_filter(x), first) and len(calls) == 1
        assert list(spectral_filter.state_dict()) == ["weight"]
        spectral_filter(noise(1, 3, 27, 20))
        assert len(calls) == 2
        spectral_filter.load_state_dict(state)
        assert torch.equal(spectral_filter(x), expected()) and not torch.equal(spectral_filter(x), first)
        spectral_filter.weight.mul_(0.5)
        assert torch.equal(spectral_filter(x), expected())
        spectral_filter.weight.data.mul_(0.5)
        assert torch.equal(spectral_filter.eval()(x), expected())
        replaced = torch.func.functional_call(spectral_filter, {"weight": 2 * spectral_filter.weight}, x)
        assert not torch.equal(replaced, expected())
        assert torch.equal(spectral_filter(x), expected())


def test_evaluation_in_inference_mode_does_not_hinder_training():
    spectral_filter, x = RadialFilter(3).eval(), noise(1, 3, 20, 27)
    with torch.inference_mode():
        spectral_filter(x)
    spectral_filter(x).sum().backward()
    assert spectral_filter.weight.grad.any()
    with torch.no_grad():
        assert torch.equal(spectral_filter(x), x)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="resize='nearest' is none of kernel, bicubic"):
        GlobalFilter(3, 8, 8, resize="nearest")
    with pytest.raises(ValueError, match="padding=-1 px is negative"):
        RadialFilter(3, padding=-1)
    with pytest.raises(ValueError, match="0 radial bands"):
        PolarFilter(3, 0)(noise(1, 3, 8, 8))


def test_response_is_the_sum_of_bands():
    spectral_filter = learnt("radial")
    gains = spectral_filter.weight.T[..., None, None]
    expected = sum(gain * band for gain, band in zip(gains, radial_bands(20, 27), strict=True))
    assert_close(spectral_filter.delta(20, 27), expected)
    x = noise(1, 3, 20, 27)
    assert_close(rfft2(spectral_filter(x)), (1 + expected) * rfft2(x), atol=1e-5, rtol=0)


# ---- GFNet's block


def test_block():
    """One residual around norm, filter, norm, MLP; the whole branch dropped at once."""
    torch.manual_seed(0)
    block = GlobalFilterBlock(6, GlobalFilter(6, 10, 13), drop_rate=0.5).eval()
    x = noise(64, 6, 10, 13)
    y = F.layer_norm(x.permute(0, 2, 3, 1), (6,))  # the fresh filter is the identity, so are the norms' scales
    expected = x + block.narrow(F.gelu(block.widen(F.layer_norm(y, (6,))))).permute(0, 3, 1, 2)
    assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    assert block.widen.weight.shape == (24, 6)
    dropped = (block.train()(x) == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    block(x).square().sum().backward()
    assert all(p.grad.any() for p in block.parameters())


# ---- graphs, in a fresh interpreter: enforced annotations would break them


class Chain(nn.Module):
    """All filters, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(learnt(name, padding=2) for name in FILTERS)

    def forward(self, x: Tensor) -> Tensor:
        for spectral_filter in self.filters:
            x = spectral_filter(x)
        return x


def report_graphs() -> None:
    """Print the relative differences that compiling and exporting make, in training and in evaluation."""
    x, report = noise(1, 3, 20, 27), {}
    for mode in (True, False):
        chain = Chain().train(mode).requires_grad_(mode)
        exported = torch.export.export(chain, (x,)).module()
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(mode):
            for tool, graph in (("export", exported), ("compile", compiled)):
                report[f"{tool} {mode}"] = relative(graph(x).detach(), chain(x).detach())
    print(json.dumps(report))


def test_one_graph_without_break_gives_the_same_numbers():
    done = run_python("from layers.test_global_filter import report_graphs; report_graphs()")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 4 and max(report.values()) < 1e-5, report
