"""Windows, positions, the mask of shifted windows and how far attention reaches."""

from itertools import product

import pytest
import torch
from tiny import relative_error, run_python
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers import window_attention, window_kernel
from archs.layers.blocks import drop_path, linear_rates
from archs.layers.window_attention import (
    SwinBlock,
    SwinTrunk,
    WindowAttention,
    attend_in_windows,
    from_windows,
    relative_positions,
    shift_mask,
    to_windows,
)

SIZES = [(8, 8), (16, 24)]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random_block(shift: int) -> SwinBlock:
    """A block whose biases and position table are not near zero."""
    torch.manual_seed(1)
    block = SwinBlock(8, 2, 8, 2.0, shift=shift, drop_rate=0.5).eval()
    block.attention.position_bias.data.normal_()
    return block.requires_grad_(False)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (16, 24), (4, 12)])
@pytest.mark.parametrize("side", [4, 2])
def test_windows_and_back(h, w, side):
    x = noise(2, h, w, 3)
    windows = to_windows(x, side)
    assert torch.equal(from_windows(windows, h, w), x)
    for row, column in product(range(h), range(w)):
        window = (row // side) * (w // side) + column // side
        token = (row % side) * side + column % side
        assert torch.equal(windows[:, window, token], x[:, row, column])


@pytest.mark.parametrize("side", [8, 3])
def test_index_of_relative_positions(side):
    index = relative_positions(side)
    assert index.dtype == torch.int64 and index.shape == (side**2, side**2)
    for query, key in product(range(side**2), repeat=2):
        rows, columns = query // side - key // side, query % side - key % side
        assert index[query, key] == (rows + side - 1) * (2 * side - 1) + columns + side - 1


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_mask_of_shifted_windows(h, w):
    """Regions of the rolled image are [0, h-8), [h-8, h-4), [h-4, h) and so in width; -100 between unlike ones."""
    mask = shift_mask(h, w, 8, 4, torch.device("cpu"))
    assert mask.shape == (h // 8 * (w // 8), 64, 64)

    def region(row: int, column: int) -> tuple[int, int]:
        return (row >= h - 8) + (row >= h - 4), (column >= w - 8) + (column >= w - 4)

    for window, (top, left) in enumerate(product(range(0, h, 8), range(0, w, 8))):
        regions = [region(top + row, left + column) for row, column in product(range(8), range(8))]
        expected = [[0.0 if query == key else -100.0 for key in regions] for query in regions]
        assert torch.equal(mask[window], torch.tensor(expected)), window


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_plain_attention_in_every_window(h, w):
    attention = random_block(0).attention
    attention.position_bias.zero_()
    x = noise(2, h, w, 8)
    result = attention(x, 0)
    for top, left in product(range(0, h, 8), range(0, w, 8)):
        tokens = x[:, top : top + 8, left : left + 8].flatten(1, 2)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        expected = attention.project(mixed).unflatten(1, (8, 8))
        assert_close(result[:, top : top + 8, left : left + 8], expected, atol=1e-5, rtol=1e-5)


def test_position_bias_is_per_head_query_and_key():
    """A bias that is huge for one displacement makes every query copy the value found there."""
    attention = random_block(0).attention
    attention.position_bias.zero_()
    for head, (down, right) in enumerate([(1, 0), (0, -2)]):  # from the key's place to the query's
        attention.position_bias[(down + 7) * 15 + right + 7, head] = 1e4
    attention.project.weight.copy_(torch.eye(8))
    attention.project.bias.zero_()
    x = noise(1, 8, 8, 8)
    value = attention.qkv(x)[..., 16:]
    result = attention(x, 0)
    assert_close(result[:, 1:, :, :4], value[:, :-1, :, :4])
    assert_close(result[:, :, :-2, 4:], value[:, :, 2:, 4:])


@pytest.mark.parametrize(
    ("shift", "pixel", "rows", "columns"),
    [
        (0, (8, 8), (8, 16), (8, 16)),
        (0, (7, 23), (0, 8), (16, 24)),
        (4, (8, 8), (4, 12), (4, 12)),
        (4, (0, 0), (0, 4), (0, 4)),  # rolled into one window with three other corners, but masked from them
        (4, (15, 0), (12, 16), (0, 4)),
        (4, (2, 10), (0, 4), (4, 12)),
        (4, (9, 22), (4, 12), (20, 24)),
    ],
)
def test_a_pixel_reaches_its_window_only(shift, pixel, rows, columns):
    block, x = random_block(shift), noise(1, 16, 24, 8)
    changed = x.clone()
    changed[0, pixel[0], pixel[1]] += noise(8)  # not a constant, which the norm would take away
    reached = (block(changed) - block(x)).abs().amax((0, 3)) > 1e-6
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[rows[0] : rows[1], columns[0] : columns[1]] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_trunk_takes_any_number_of_windows(h, w):
    torch.manual_seed(2)
    trunk = SwinTrunk(6, 8, (2, 1), heads=2, window=8, mlp_ratio=1.5, drop_path=0.3)
    assert trunk.eval()(noise(2, 6, h, w)).shape == (2, 6, h, w)
    blocks = [block for group in trunk.groups for block in group.blocks]
    assert [block.shift for block in blocks] == [0, 4, 0]
    assert [block.drop_rate for block in blocks] == pytest.approx([0, 0.15, 0.3])


def test_heads_must_divide():
    with pytest.raises(ValueError, match="embed_dim=8 does not divide by heads=3"):
        WindowAttention(8, 3, 8)


def test_stochastic_depth():
    x = noise(4000, 3, 2) + 2
    assert drop_path(x, 0.3, False) is x
    assert drop_path(x, 0.0, True) is x
    torch.manual_seed(3)
    dropped = drop_path(x, 0.3, True)
    kept = dropped.flatten(1).any(1)
    assert_close(dropped[kept], x[kept] / 0.7)
    assert abs(kept.float().mean() - 0.7) < 0.03
    assert abs(dropped.mean() - x.mean()) < 0.1
    assert linear_rates(0.1, 3) == pytest.approx([0, 0.05, 0.1])


def test_stochastic_depth_is_for_training():
    block, x = random_block(0), noise(64, 8, 8, 8)
    assert torch.equal(block(x), block(x))
    block.train()
    torch.manual_seed(4)
    whole = (block(x) == x).flatten(1).all(1)  # both branches dropped: a quarter of the items
    assert 4 <= whole.sum() <= 32


# ---- the compiled kernels


needs_kernel = pytest.mark.skipif(not window_kernel.has_kernel(), reason="no C compiler, or RESTORE_ATTENTION=torch")
SHAPES = [(8, 6, 12), (8, 2, 24), (4, 2, 4), (2, 1, 5), (7, 3, 5), (3, 1, 1)]  # side, heads, channels of a head


@needs_kernel
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("side", "heads", "dim"), SHAPES)
def test_the_kernel_is_the_definition(side, heads, dim, shifted, monkeypatch):
    """Values and gradients, against PyTorch in double precision; bf16 is rounded once."""
    shift = side // 2 if shifted else 0
    qkv, bias = noise(2, 2 * side, 3 * side, 3 * heads * dim), noise(heads, side**2, side**2)
    along = noise(2, 2 * side, 3 * side, heads * dim)

    def results(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (qkv, bias)]
        y = attend_in_windows(*inputs, shift)
        return [y.detach(), *torch.autograd.grad(y, inputs, along.to(y.dtype))]

    kernel, half = results(torch.float32), results(torch.bfloat16)
    monkeypatch.setattr(window_attention, "has_kernel", lambda: False)
    exact = results(torch.float64)
    for ours, rounded, expected in zip(kernel, half, exact, strict=True):
        assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
        assert rounded.dtype == torch.bfloat16 and relative_error(rounded, expected) < 2e-2


@needs_kernel
def test_operators_are_registered_right():
    qkv, bias = noise(2, 8, 4, 3 * 8).requires_grad_(), noise(2, 16, 16).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(window_kernel.window_kernel, (qkv, bias, 4, 2), test_utils=checks)
    backward = qkv.detach(), bias.detach(), noise(2, 8, 4, 8), 4, 2
    torch.library.opcheck(window_kernel._backward_kernel, backward, test_utils=("test_schema", "test_faketensor"))


def test_the_kernel_can_be_switched_off():
    code = "from archs.layers.window_kernel import has_kernel; print(has_kernel())"
    assert run_python(code, RESTORE_ATTENTION="torch").stdout == "False\n"
