"""ATM: equal to the released program's numbers, and the laws of its four operations for any weights."""

import pytest
import torch
from safetensors.torch import load_file
from seeded import SHARED, golden, value
from tiny import seeded_clip, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs.layers.atm import (
    ATMBranch,
    ATMTokens,
    frame_pairs,
    from_published,
    local_correlation,
    published_names,
    to_published,
    token_names,
)

BRANCHES = {  # of the golden files: operation, frames, context, shape of the input, seed of the input
    "addition_c32_t6_z3": ("add", 6, 3, (12, 32, 10, 8), 46),
    "division_c32_t6_z3": ("div", 6, 3, (12, 32, 10, 8), 46),
    "multiplication_c32_t4_z1": ("mul", 4, 1, (8, 32, 9, 12), 44),
    "subtraction_c32_t4_z1": ("sub", 4, 1, (8, 32, 9, 12), 44),
    "subtraction_c32_t6_z3": ("sub", 6, 3, (12, 32, 10, 8), 46),
}
TOKENS = ((197, 8, 64), 9)
OPERATIONS = ["add", "sub", "mul", "div"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: ATMBranch | ATMTokens, names: tuple[tuple[str, str], ...]) -> ATMBranch | ATMTokens:
    """The weights of the golden files, which follow from their published keys and shapes."""
    published = to_published(module.state_dict(), names)
    weights = {key: value(key, tuple(tensor.shape), gain=2.0) for key, tensor in published.items()}
    module.load_state_dict(from_published(weights, names))
    return module.eval()


def lively(channels: int = 6, **arguments: object) -> ATMBranch:
    """A small branch that passes signals on at full strength, its last weights and its norms included."""
    torch.manual_seed(0)
    branch = ATMBranch(channels, **{"operation": "sub", "hidden": 4, **arguments}).eval().requires_grad_(False)
    for key, tensor in branch.state_dict().items():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
        elif key.endswith(("running_mean", "bias")):
            tensor.copy_(0.1 * noise(*tensor.shape))
    return branch


# ---- the released program's numbers


@pytest.mark.parametrize("name", BRANCHES)
def test_published_branches(name):
    operation, frames, context, shape, seed = BRANCHES[name]
    branch = seeded(ATMBranch(shape[1], operation=operation, context=context), published_names(operation))
    x = noise(*shape, seed=seed).unflatten(0, (-1, frames)).requires_grad_()
    result = branch(x)
    assert_close(result.flatten(0, 1)[:, ::2], golden("atm_outputs")[name], atol=1e-5, rtol=0)
    assert (result - x.relu()).abs().max() > 1  # the branch takes part
    result.square().sum().backward()
    for key, parameter in [("x", x), *branch.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_published_tokens():
    block = seeded(ATMTokens(64), token_names())
    x = noise(*TOKENS[0], seed=TOKENS[1]).requires_grad_()
    result = block(x.transpose(0, 1)[None], (14, 14))[0].transpose(0, 1)
    assert_close(result[::3], golden("atm_outputs")["tokens_c64_t8"], atol=1e-5, rtol=0)
    assert torch.equal(result[0], x[0])  # the class token passes by
    result.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in [x, *block.parameters()])


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the complete golden files are not in ../shared")
@pytest.mark.parametrize("name", [*BRANCHES, "tokens_c64_t8"])
def test_golden_outputs_are_parts_of_the_complete_ones(name):
    complete = load_file(SHARED / f"golden/atm_{name}.safetensors")
    shape, seed = BRANCHES[name][3:] if name in BRANCHES else TOKENS
    assert torch.equal(noise(*shape, seed=seed), complete["x"])
    part = complete["y"][:, ::2] if name in BRANCHES else complete["y"][::3]
    assert torch.equal(part, golden("atm_outputs")[name])
    names = published_names(BRANCHES[name][0]) if name in BRANCHES else token_names()
    theirs = {key.removeprefix("state."): tensor for key, tensor in complete.items() if key.startswith("state.")}
    assert all(torch.equal(value(key, tuple(tensor.shape), gain=2.0), tensor) for key, tensor in theirs.items())
    again = to_published(from_published(theirs, names), names)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in theirs.items())


def test_size():
    counts = {}
    for channels in (768, 64):
        for operation in OPERATIONS:
            branch = ATMBranch(channels, operation=operation)
            counts[channels, operation] = sum(parameter.numel() for parameter in branch.parameters())
    assert counts == {
        **{(768, operation): 750_080 for operation in ("add", "sub", "div")}, (768, "mul"): 797_068,
        **{(64, operation): 299_520 for operation in ("add", "sub", "div")}, (64, "mul"): 346_508,
    }  # fmt: skip
    block = ATMTokens(768)
    assert sum(parameter.numel() for parameter in block.parameters()) == 1_547_148
    assert len(block.state_dict()) == 74


def gmac_of(module: torch.nn.Module, *inputs: object) -> float:
    """Of the convolutions: the counter does not see the products of the correlation."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("operation", "stride", "published"),
    [("add", 1, 29.8), ("sub", 2, 7.45), ("div", 1, 29.8), ("mul", 1, 65.5), ("mul", 2, 16.4)],
)
def test_cost(operation, stride, published):
    with torch.device("meta"):
        branch = ATMBranch(64, operation=operation, stride=stride).eval()
        convolutions = gmac_of(branch, torch.zeros(1, 7, 64, 64, 112))
    correlation = 81 * 64 * 5 * 7 * 64 * 112 / stride**2 / 1e9 if operation == "mul" else 0
    assert convolutions + correlation == pytest.approx(published, rel=5e-3)


def test_cost_of_tokens():
    """The published 4.45 has the released program's correlation of all 196 x 196 places; 81 shifts are 0.06 less."""
    with torch.device("meta"):
        convolutions = gmac_of(ATMTokens(768).eval(), torch.zeros(1, 8, 197, 768), (14, 14))
    assert convolutions + 196 * 196 * 64 * 5 * 8 / 1e9 == pytest.approx(4.45, rel=1e-3)
    assert convolutions + 81 * 196 * 64 * 5 * 8 / 1e9 == pytest.approx(4.39, rel=1e-3)


# ---- pairs of frames


def test_pairs_of_frames():
    frames = torch.arange(1.0, 5).view(1, 4, 1, 1, 1)

    def paired(context: int, ends: str = "zeros") -> list[list[list[float]]]:
        return [part[0, ..., 0, 0, 0].tolist() for part in frame_pairs(frames, context, ends)]

    assert paired(1) == [[[1], [1], [2], [3]], [[1], [2], [3], [4]]]
    assert paired(3) == [[[i] * 3 for i in (1, 2, 3, 4)], [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]]]
    assert paired(2)[1] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert paired(5, "replicate")[1] == [[1, 1, 1, 2, 3], [1, 1, 2, 3, 4], [1, 2, 3, 4, 4], [2, 3, 4, 4, 4]]


# ---- local correlation


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (10, 12)])
def test_correlation_is_that_of_all_places_near_by(size):
    a, b = noise(2, 5, *size), noise(2, 5, *size, seed=1)
    result = local_correlation(a, b)
    unit = [x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (a, b)]
    dense = torch.einsum("nchw,ncyx->nhwyx", *unit)
    for u, v in [(0, 0), (4, 4), (3, 8), (8, 0), (5, 4)]:
        for h, w in [(0, 0), (size[0] - 1, size[1] // 2), (size[0] // 2, size[1] - 1)]:
            y, x = h + u - 4, w + v - 4
            inside = 0 <= y < size[0] and 0 <= x < size[1]
            expected = dense[:, h, w, y, x] if inside else torch.zeros(2)
            assert_close(result[:, u * 9 + v, h, w], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -3), (-4, 4)])
def test_correlation_peaks_at_the_displacement(down, right):
    a = noise(1, 16, 12, 12)
    peaks = local_correlation(a, torch.roll(a, (down, right), (2, 3))).argmax(1)[0, 4:8, 4:8]
    assert (peaks == (down + 4) * 9 + right + 4).all()


def test_correlation_ignores_gains_and_has_a_gradient():
    a, b = noise(1, 8, 5, 5), noise(1, 8, 5, 5, seed=1)
    assert_close(local_correlation(3 * a, 0.5 * b), local_correlation(a, b), atol=1e-5, rtol=0)
    assert_close(local_correlation(b, a).flip(1)[:, :, 2, 2], _reversed_lookup(local_correlation(a, b), 2, 2))
    nothing = torch.zeros(1, 8, 5, 5, requires_grad=True)
    local_correlation(nothing, nothing).sum().backward()
    assert nothing.grad.isfinite().all()
    small = [noise(1, 2, 3, 2, seed=i).double().requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: local_correlation(a, b, 3), small, atol=1e-4)


def _reversed_lookup(correlation: Tensor, h: int, w: int) -> Tensor:
    """From <a[q], b[q + d]> what <b[h, w], a[h, w - d]> must be, for every d; 0 where h, w - d is outside."""
    rows = F.pad(correlation, (4, 4, 4, 4))
    values = [rows[:, u * 9 + v, h - (u - 4) + 4, w - (v - 4) + 4] for u in range(9) for v in range(9)]
    return torch.stack(values, dim=1)


def test_a_long_vector_in_half_precision_stays_finite():
    a = 300 * noise(1, 64, 4, 4).half()
    assert_close(local_correlation(a, a)[:, 40].float(), torch.ones(1, 4, 4), atol=5e-3, rtol=0)


# ---- the branch


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("frames", "size", "stride"), [(1, (5, 7), 1), (3, (9, 6), 2), (2, (1, 11), 4)])
def test_a_fresh_branch(operation, frames, size, stride):
    """Any length and size: ReLU(x), or x without the ReLU."""
    x = noise(2, frames, 3, *size)
    assert torch.equal(ATMBranch(3, operation=operation, hidden=4, stride=stride)(x), x.relu())
    plug_in = ATMBranch(
        3, operation=operation, hidden=4, stride=stride, final_relu=False, ends="replicate", resize="bilinear",
        norm="group", context=2,
    )  # fmt: skip
    assert torch.equal(plug_in(x), x)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("ends", ["zeros", "replicate"])
def test_time_reversed(operation, ends):
    """Frames in reverse are the same frames with the context's weights in reverse."""
    branch = lively(operation=operation, context=3, ends=ends)
    reverse = lively(operation=operation, context=3, ends=ends)
    weight = reverse.transfer.fuse[0].weight
    weight.copy_(weight.unflatten(1, (3, 4)).flip(1).flatten(1, 2))
    x = noise(1, 5, 6, 6, 7)
    assert_close(branch(x.flip(1)), reverse(x).flip(1), atol=1e-5, rtol=1e-5)
    assert (branch(x.flip(1)) - branch(x).flip(1)).abs().max() > 1e-3


@pytest.mark.parametrize("operation", ["sub", "div"])
@pytest.mark.parametrize("arguments", [{"context": 1}, {"context": 3, "ends": "replicate"}])
def test_equal_frames_have_no_difference(operation, arguments):
    """The update of a clip at rest does not depend on what it shows; that of a moving one does."""
    branch = lively(operation=operation, final_relu=False, **arguments)
    still = noise(2, 1, 6, 6, 5).expand(2, 4, 6, 6, 5)
    update = branch(still) - still
    assert_close(update[0], update[1], atol=1e-5, rtol=0)
    assert_close(update[:, :1].expand_as(update), update, atol=1e-5, rtol=0)
    moving = noise(2, 4, 6, 6, 5)
    assert ((branch(moving) - moving)[0] - (branch(moving) - moving)[1]).abs().max() > 1e-2


def test_operations():
    """With pairs of positive maps: what each operation makes of them."""
    a, x = seeded_clip(1, 4, 5, 5), seeded_clip(1, 4, 5, 5, seed=1)
    results = {operation: lively(operation=operation)._operate(a, x) for operation in OPERATIONS}
    assert torch.equal(results["add"], x + a)
    assert torch.equal(results["sub"], x - a)
    assert_close(results["div"].exp(), (1 + x) / (1 + a))
    for operation, sign in [("add", 1), ("sub", -1), ("div", -1)]:
        assert_close(lively(operation=operation)._operate(x, a), sign * results[operation], atol=1e-6, rtol=0)
    assert_close(lively(operation="mul")._operate(5 * a, x / 2), results["mul"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("context", "reach"), [(1, {2, 3}), (3, {1, 2, 3}), (5, {0, 1, 2, 3, 4})])
def test_a_frame_reaches_its_context(operation, context, reach):
    branch, x = lively(operation=operation, context=context, final_relu=False), noise(2, 6, 6, 6, 5)
    changed = x.clone()
    changed[0, 2] += noise(6, 6, 5, seed=3)
    reached = (branch(changed) - branch(x)).abs().amax((2, 3, 4)) > 1e-6
    assert {int(t) for t in reached[0].nonzero()} == reach
    assert not reached[1].any()


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_stride_writes_every_second_pixel(size):
    """As a transposed convolution of kernel 1 does, here from the published shape of its weight."""
    branch, x = lively(stride=2, final_relu=False), noise(1, 2, 6, *size)
    state = to_published(branch.state_dict(), published_names("sub"), stride=2)
    weight = state["diff2vis.upsample.0.weight"]
    assert weight.shape == (4, 6, 1, 1, 1)
    given: list[Tensor] = []
    branch.transfer.fuse.register_forward_hook(lambda module, inputs, output: given.append(output))
    update = branch(x) - x
    expected = F.conv_transpose3d(given[0][:, :, None], weight, stride=(1, 2, 2), output_padding=(0, 1, 1))[:, :, 0]
    assert_close(update[0], expected[..., : size[0], : size[1]], atol=1e-5, rtol=1e-5)
    again = from_published(state, published_names("sub"), stride=2)
    assert all(torch.equal(again[key], tensor) for key, tensor in branch.state_dict().items())
    branch.resize = "bilinear"
    assert ((branch(x) - x)[..., 1::2, 1::2]).abs().max() > 1e-2


def test_group_norm_knows_one_map_only():
    branch, x = lively(norm="group", context=1, final_relu=False).train(), noise(2, 3, 6, 6, 5)
    assert_close(branch(x)[1:], branch(x[1:]), atol=1e-5, rtol=1e-5)
    assert not [key for key in branch.state_dict() if "running" in key]


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "xor"}, "operation='xor' is none of add, sub, mul, div"),
        ({"ends": "mirror"}, "ends='mirror' is none of zeros, replicate"),
        ({"resize": "nearest"}, "resize='nearest' is none of sparse, bilinear"),
        ({"norm": "layer"}, "norm='layer' is none of batch, group"),
        ({"context": 0}, "context=0 is not at least 1"),
        ({"stride": 0}, "stride=0 is not at least 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        ATMBranch(8, **{"operation": "sub", **arguments})


def test_tokens_and_keys_that_do_not_fit():
    with pytest.raises(ValueError, match="10 tokens are not one of the class and 3x4 patches"):
        ATMTokens(4, hidden=4)(torch.zeros(1, 2, 10, 4), (3, 4))
    with pytest.raises(ValueError, match=r"conv1\.weight: no weight of this ATM is called so"):
        from_published({"conv1.weight": torch.zeros(1)}, published_names("mul"))
