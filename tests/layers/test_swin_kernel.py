"""The compiled kernel of a Swin block: equal to the block layer by layer, forward and backward, and when it is used."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import relative_error, run_python
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from archs.layers import swin_kernel, window_attention, window_kernel
from archs.layers.blocks import drop_factors, drop_path
from archs.layers.swin_kernel import swin_block_kernel
from archs.layers.window_attention import SwinBlock

pytestmark = pytest.mark.skipif(not swin_kernel.has_kernel(), reason="no C compiler, or RESTORE_ATTENTION=torch")
SHAPES = [(8, 6, 12), (8, 2, 24), (4, 2, 4), (2, 1, 5), (7, 3, 5), (3, 1, 3)]  # side, heads, channels of a head
each_shape = pytest.mark.parametrize(("side", "heads", "dim"), SHAPES)
shifted_or_not = pytest.mark.parametrize("shifted", [False, True])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_block(side: int = 8, heads: int = 2, dim: int = 4, *, shifted: bool = True, rate: float = 0.0) -> SwinBlock:
    """A block in training, none of whose parameters is near its initial value."""
    torch.manual_seed(5)
    block = SwinBlock(heads * dim, heads, side, 1.5, shift=side // 2 if shifted else 0, drop_rate=rate)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.4)
    return block.train()


def image(block: SwinBlock, count: int = 3) -> Tensor:
    side = block.attention.window
    return noise(count, 2 * side, 3 * side, block.norm1.weight.numel())


def results(block: SwinBlock, x: Tensor, along: Tensor, seed: int = 0) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters; stochastic depth is drawn from ``seed``."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], along)]


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention, "has_kernel", lambda: False)


def used(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel is asked for by ``call``."""
    asked: list[bool] = []

    def spy(*arguments: object) -> Tensor:
        asked.append(True)
        return swin_block_kernel(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(swin_kernel, "swin_block_kernel", spy)
        call()
    return bool(asked)


@each_shape
@shifted_or_not
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_is_the_block(side, heads, dim, shifted, rate, threads, monkeypatch):
    """Values and all gradients, against the block layer by layer in double precision from the same random numbers."""
    torch.set_num_threads(threads)
    block = random_block(side, heads, dim, shifted=shifted, rate=rate)
    x = image(block)
    along = noise(*x.shape)
    seed = next(s for s in range(99) if rate == 0 or some_of_each(s, len(x), rate))
    assert used(lambda: block(x), monkeypatch)
    ours = results(block, x, along, seed)
    state = torch.get_rng_state()
    layer_by_layer(monkeypatch)
    exact = results(block.double(), x.double(), along.double(), seed)
    assert torch.equal(torch.get_rng_state(), state)
    for value, expected in zip(ours, exact, strict=True):
        assert value.dtype == torch.float32 and value.shape == expected.shape
        assert (value - expected).norm() <= 1e-5 * expected.norm() > 0


def some_of_each(seed: int, count: int, rate: float) -> bool:
    """Whether both branches keep some of the images and drop others, and an image is dropped by both."""
    torch.manual_seed(seed)
    first, second = (torch.rand(count) >= rate for _ in range(2))
    return bool((first & second).any() and (first & ~second).any() and not (first | second).all())


def test_the_draws_of_stochastic_depth():
    """One number an image, first of the attention's branch, then of the other's: seeds mean what they always have."""
    x = noise(6, 8, 8, 8)
    torch.manual_seed(1)
    kept = torch.rand(6, 1, 1, 1) >= 0.25
    torch.manual_seed(1)
    factors = drop_factors(x, 0.25)
    assert_close(factors, kept.float() / 0.75)
    torch.manual_seed(1)
    assert torch.equal(drop_path(x, 0.25, True), x * factors)


def test_what_is_dropped_passes_unchanged():
    block = random_block(rate=0.999)
    x = image(block).requires_grad_()
    torch.manual_seed(0)
    y = block(x)
    (gx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(y, x) and torch.equal(gx, x)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_repeat_to_the_bit(threads):
    torch.set_num_threads(threads)
    block = random_block(rate=0.3)
    x = image(block)
    for first, second in zip(*(results(block, x, x) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", ["x", "attention", "mlp", "norms", "all"])
def test_what_is_frozen_gets_no_gradient(frozen, monkeypatch):
    """And the rest gets its own, also where the gradient that comes in is an expanded number."""
    block = random_block()
    x = image(block).requires_grad_()
    block(x).sum().backward()
    expected = {name: parameter.grad for name, parameter in [*block.named_parameters(), ("x", x)]}
    names = {"x": ["x"], "attention": ["attention", "norm1"], "mlp": ["norm2", "widen", "narrow"],
             "norms": ["norm"], "all": ["norm", "attention", "widen", "narrow"]}[frozen]  # fmt: skip
    for name, tensor in [*block.named_parameters(), ("x", x)]:
        tensor.grad = None
        tensor.requires_grad_(not name.startswith(tuple(names)))
    assert used(lambda: block(x).sum().backward(), monkeypatch)
    for name, tensor in [*block.named_parameters(), ("x", x)]:
        assert (tensor.grad is None) == name.startswith(tuple(names)), name
        assert tensor.grad is None or torch.equal(tensor.grad, expected[name])


def test_recomputed_activations_drop_the_same():
    block = random_block(rate=0.5)
    x = image(block, 5)
    plain = results(block, x, x)
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    y = checkpoint(block, leaf, use_reentrant=False)
    again = [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], x)]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@each_shape
@shifted_or_not
def test_without_a_gradient(side, heads, dim, shifted, monkeypatch):
    """Also in bfloat16, whose rounding of the image is that of its storage."""
    block = random_block(side, heads, dim, shifted=shifted, rate=0.5).requires_grad_(False).eval()
    x = image(block)
    at_once = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = block(x.bfloat16())
    layer_by_layer(monkeypatch)
    expected = block.double()(x.double())
    assert_close(at_once.double(), expected, atol=2e-5, rtol=2e-5)
    assert half.dtype == torch.bfloat16 and relative_error(half, expected) < 1e-2


@each_shape
def test_gradients_in_bfloat16(side, heads, dim, monkeypatch):
    """Where the kernel takes them: with tiles of bfloat16 in the processor the layers are faster."""
    block = random_block(side, heads, dim)
    x = image(block).bfloat16()
    monkeypatch.setattr(window_attention, "has_amx", lambda: True)

    def half() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(block, x, x)

    assert not used(half, monkeypatch)
    monkeypatch.setattr(window_attention, "has_amx", lambda: False)
    assert used(half, monkeypatch)
    ours = half()
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    layer_by_layer(monkeypatch)
    for value, expected in zip(ours, results(block.double(), x.double(), x.double()), strict=True):
        assert (value - expected).norm() < 2e-2 * expected.norm()


def test_what_does_not_fit_goes_layer_by_layer(monkeypatch):
    """A window of too many numbers always, weights whose gradients are too many where they learn."""
    assert swin_kernel.suits(180, 360, 64, learns=True)
    assert not swin_kernel.suits(64, 128, 17**2, learns=False)
    assert not swin_kernel.suits(512, 2048, 128, learns=False)
    block, x = SwinBlock(192, 2, 4, 4.0, shift=0, drop_rate=0.0), noise(1, 4, 4, 192)
    assert not used(lambda: block(x), monkeypatch)
    block.requires_grad_(False)
    assert used(lambda: block(x), monkeypatch) and not used(lambda: block(x.clone().requires_grad_()), monkeypatch)


@pytest.mark.parametrize("position", [(0, 0), (5, 11)])
def test_the_block_lets_nothing_hide_what_is_not_finite(position):
    block, x = random_block(shifted=False), noise(1, 8, 16, 8)
    x[0, position[0], position[1], 3] = torch.nan
    x.requires_grad_()
    y = block(x)
    (gx,) = torch.autograd.grad(y.sum(), x)
    for reached in (values.isnan().any(3)[0] for values in (y, gx)):
        assert reached[:, :8].all() == (position[1] < 8) and reached[:, 8:].all() == (position[1] >= 8)


def test_operators_are_registered_right():
    sizes = [(24, 8), (24,), (8, 8), (8,), (2, 16, 16), (12, 8), (12,), (8, 12), (8,)]
    x, weights, factors = noise(2, 8, 4, 8), [noise(*size) for size in sizes], torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    learnt = x.clone().requires_grad_(), [weight.clone().requires_grad_() for weight in weights], factors, 4, 2
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(swin_block_kernel, learnt, test_utils=checks)
    backward = noise(2, 8, 4, 8), x, weights, factors, 4, 2
    torch.library.opcheck(swin_kernel._backward_kernel, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("learns", [False, True])
def test_multiply_adds_are_counted(learns, monkeypatch):
    def counted() -> int:
        with FlopCounterMode(display=False, custom_mapping={**swin_kernel.FLOPS, **window_kernel.FLOPS}) as counter:
            y = block(x)
            if learns:
                y.sum().backward()
        return counter.get_total_flops()

    block, x = random_block().requires_grad_(learns), noise(2, 16, 8, 8).requires_grad_(learns)
    assert used(counted, monkeypatch)
    at_once = counted()
    monkeypatch.setattr(SwinBlock, "_at_once", lambda block, x: False)
    by_layers = counted()
    layer_by_layer(monkeypatch)
    assert at_once == by_layers == counted() > 0


def test_the_kernel_can_be_switched_off():
    code = "from archs.layers.swin_kernel import has_kernel; print(has_kernel())"
    assert run_python(code, RESTORE_ATTENTION="torch").stdout == "False\n"
