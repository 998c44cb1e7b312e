"""Dynamic temporal filtering: the published numbers, and the laws of every predictor, sharing and norm."""

import pytest
import torch
from safetensors.torch import load_file
from seeded import SHARED, golden
from tiny import awaken, seeded_clip, unchecked
from torch import Tensor
from torch.testing import assert_close

from archs.layers.dtf import PUBLISHED_KEYS, ClipPredictor, DTFBlock, add_next_frame, local_correlation

VARIANTS = [
    {"predictor": "native"}, {"predictor": "resample"}, {"sharing": "paper"}, {"sharing": "paper", "norm": "gn"},
    {"sharing": "paper", "predictor": "taps", "norm": "gn", "radius": 2}, {"predictor": "resample", "norm": "none"},
]  # fmt: skip


def published(name: str) -> tuple[DTFBlock, dict[str, Tensor]]:
    """The block of a golden file with its weights, and the file."""
    if name == "dtf_block_c64_t7":
        path = SHARED / f"golden/{name}.safetensors"
        if not path.is_file():
            pytest.skip("the complete golden files are not in ../shared")
        file = load_file(path)
    else:
        file = golden(name)
    width, frames, _, groups = file["config"].tolist()
    block = DTFBlock(width, frames, groups=groups).eval()
    weights = {ours: file[f"state.{theirs}"] for ours, theirs in PUBLISHED_KEYS.items()}
    block.correlation_weight = weights.pop("correlation_weight")
    if (block.correlation_weight == 1 / width).all():
        block.correlation_weight = None
        assert weights.keys() == block.state_dict().keys()
    block.load_state_dict(weights, strict=False)
    return block, file


def small(frames: int = 4, dim: int = 16, **arguments: object) -> DTFBlock:
    """A block with nothing left at zero."""
    torch.manual_seed(0)
    return awaken(DTFBlock(dim, frames, **arguments), 0.5).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the published numbers


GOLDENS = pytest.mark.parametrize("name", ["dtf_block_c32_t4", "dtf_block_c64_t7"])


@GOLDENS
def test_stages(name):
    block, file = published(name)
    x = file["x"]
    correlation = local_correlation(x, block.correlation_weight)
    assert_close(correlation, file["cor"], atol=1e-5, rtol=1e-5)
    if "att" in file:
        assert_close(correlation.softmax(1).transpose(1, 2), file["att"], atol=1e-5, rtol=1e-5)
    enhanced = add_next_frame(x, correlation)
    assert_close(enhanced, file["enhanced"], atol=1e-5, rtol=1e-5)
    if "filt" in file:
        filters = block.predictor(torch.cat([enhanced, correlation], 1))
        assert_close(filters, file["filt"], atol=1e-5, rtol=1e-5)


@GOLDENS
def test_output_and_gradients(name):
    block, file = published(name)
    x = file["x"].clone().requires_grad_()
    result = block(x)
    assert_close(result, file["y"], atol=1e-5, rtol=1e-5)
    result.backward(file["grad_out"])
    assert x.grad is not None
    assert_close(x.grad, file["grad_input"], atol=1e-5, rtol=1e-5)
    for key, parameter in {
        "alpha1": block.scale, "complex_weight": block.mixing, "filter_g": block.predictor.weight
    }.items():  # fmt: skip
        assert parameter.grad is not None
        expected = file[f"grad_{key}"]
        assert_close(parameter.grad, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)  # sums of thousands


@GOLDENS
def test_training_pass(name):
    block, file = published(name)
    with torch.no_grad():
        result = block.train()(file["x"])
    assert_close(result, file["output_train_mode"], atol=1e-5, rtol=1e-5)
    assert_close(block.norm.running_mean, file["running_mean_after_train"], atol=1e-5, rtol=1e-5)
    assert_close(block.norm.running_var, file["running_var_after_train"], atol=1e-5, rtol=1e-5)


# ---- laws


@pytest.mark.parametrize("arguments", VARIANTS)
def test_identity_at_the_start(arguments):
    x = noise(2, 16, 4, 5, 3)
    for frames in (4, 7):
        assert torch.equal(DTFBlock(16, frames, **arguments)(x), x)


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 3, 3), (2, 1, 7), (3, 4, 4), (11, 5, 2)])
def test_any_length_and_size(arguments, shape):
    block, x = small(**arguments), noise(2, 16, *shape)
    with torch.no_grad():
        result = block(x)
        assert result.shape == x.shape and result.isfinite().all()
        assert (result - x).abs().max() > 1e-3
        assert_close(block(x[1:]), result[1:], atol=1e-5, rtol=1e-5)  # clips of a batch do not meet


def test_resampled_at_the_native_length_is_native():
    native, resampled, x = small(6), small(6, predictor="resample"), noise(1, 16, 6, 4, 5)
    resampled.load_state_dict(native.state_dict())
    assert torch.equal(resampled(x), native(x))


def test_resampled_filters_of_a_clip_that_stands_still():
    """What is equal in all frames is predicted alike at any length: same mean response, same lowest frequencies."""
    predictor = ClipPredictor(16, 8).requires_grad_(False)
    features = noise(1, 25, 1, 3, 3)
    short, long = (predictor(features.expand(-1, -1, frames, -1, -1)) for frames in (8, 16))
    assert_close(long[:, :, ::2], short, atol=1e-5, rtol=1e-5)  # the bins that both have
    assert_close(long[:, :, 1], (short[:, :, 0] + short[:, :, 1]) / 2, atol=1e-5, rtol=1e-5)


def test_windows_of_a_long_clip():
    """Every half length a window: what one alone covers is its own, what two cover is the same wherever they lie."""
    block, x = small(4, norm="gn"), noise(1, 16, 4, 3, 3)
    with torch.no_grad():
        first = block(x)
        assert_close(block(torch.cat([x, noise(1, 16, 4, 3, 3, seed=1)], 2))[:, :, :2], first[:, :, :2])
        still = x[:, :, :1].expand(-1, -1, 11, -1, -1)
        long = block(still)
        assert_close(long[:, :, 4:6], long[:, :, 2:4], atol=1e-5, rtol=1e-5)


def test_taps_are_a_convolution_over_time():
    """A predictor whose filters are constant is a circular convolution of the frames with its taps."""
    block = small(4, sharing="paper", predictor="taps", radius=1, norm="none")
    block.predictor.taps.weight.data.zero_()
    kernel = torch.tensor([0.1, -0.2, 0.3])
    block.predictor.taps.bias.data.copy_(kernel)
    x = noise(1, 25, 9, 2, 2)
    filters = torch.view_as_complex(block.predictor(x).contiguous())
    features = x[:, :16]
    filtered = torch.fft.irfft(torch.fft.rfft(features, dim=2) * filters, n=9, dim=2)
    expected = sum(kernel[k] * features.roll(k - 1, 2) for k in range(3))
    assert_close(filtered, expected, atol=1e-5, rtol=1e-5)


def test_sharing():
    """As in the code, real and imaginary parts are equal; as in the paper, 16 channels have one complex filter."""
    z = noise(1, 41, 4, 2, 2)
    code, paper = ClipPredictor(32, 4, sharing="code"), ClipPredictor(32, 4, sharing="paper")
    assert code.weight.shape == paper.weight.shape
    filters = code(z)
    assert torch.equal(filters[..., 0], filters[..., 1])
    flat = filters[0, :, :, 0, 0, 0].flatten()  # (C, M) in steps of eight
    assert torch.equal(flat, flat[::8].repeat_interleave(8))
    filters = paper(z)
    assert torch.equal(filters[:, :16], filters[:, :1].expand_as(filters[:, :16]))
    assert (filters[..., 0] - filters[..., 1]).abs().max() > 1e-3
    assert (filters[:, 0] - filters[:, 16]).abs().max() > 1e-3


def test_correlation_and_aggregation_are_what_their_sums_say():
    x = noise(1, 3, 3, 4, 5)
    correlation, (h, w) = local_correlation(x), x.shape[-2:]
    enhanced = add_next_frame(x, correlation)
    for t, row, column in [(0, 0, 0), (1, 2, 3), (2, 3, 4)]:
        for tap in range(9):
            y, z = row + tap // 3 - 1, column + tap % 3 - 1
            inside = 0 <= y < h and 0 <= z < w
            expected = (x[0, :, max(t - 1, 0), row, column] * x[0, :, t, y, z]).mean() if inside else torch.zeros(())
            assert_close(correlation[0, tap, t, row, column], expected)
    weights = correlation[0, :, 2, 2, 3].softmax(0)
    found = (weights * x[0, :, 2, 1:4, 2:5].flatten(1)).sum(1)
    assert_close(enhanced[0, :, 1, 2, 3], x[0, :, 1, 2, 3] + found)
    assert torch.equal(enhanced[:, :, 2], x[:, :, 2])


@pytest.mark.parametrize("arguments", VARIANTS[2:])
def test_gradients(arguments):
    """By finite differences, and every parameter has one."""
    block, x = small(3, **arguments).double(), noise(1, 16, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)
    block(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("arguments", VARIANTS)
def test_half_precision(arguments):
    """Spectra are float32 under autocast and for weights in half precision."""
    block, x = small(**arguments).requires_grad_(False), seeded_clip(1, 16, 4, 4, 5)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), exact)
    half = block.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().mean() < 0.05 * (exact - x).abs().mean() + 0.01


def test_norm_of_a_location():
    """With "gn" the size of the effect does not follow the size of the features."""
    block, x = small(norm="gn").requires_grad_(False), noise(1, 16, 4, 3, 3)
    change, louder = block.change(x), block.change(10 * x)
    assert 0.3 < louder.square().mean() / change.square().mean() < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharing": "all"}, "sharing='all' is none of code, paper"),
        ({"predictor": "mlp"}, "predictor='mlp' is none of native, resample, taps"),
        ({"norm": "ln"}, "norm='ln' is none of bn, gn, none"),
        ({"predictor": "taps"}, "set sharing='paper'"),
        ({"dim": 12}, r"dim=12 x 3 bins x 2 does not divide by groups=16"),
        ({"dim": 24, "sharing": "paper"}, "dim=24 does not divide by groups=16"),
        ({"dim": 24, "sharing": "paper", "predictor": "taps"}, "dim=24 does not divide by groups=16"),
        ({"sharing": "paper", "predictor": "taps", "radius": -1}, "radius=-1 frames is negative"),
        ({"frames": 0}, "clip_length=0 is less than one frame"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        small(**arguments)
