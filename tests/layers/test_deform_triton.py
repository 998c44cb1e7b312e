"""The Triton kernels against the definition and against PyTorch: in Triton's interpreter, and on a GPU with -m gpu.

The interpreter runs a kernel line by line in NumPy. What it cannot see, types and registers, the compiler for an
NVIDIA GPU says without one (`test_kernels_compile`); nothing here has been run on hardware yet.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deform import OPERATIONS, assert_as_defined, random_case, use, values_and_gradients, with_gradients
from tiny import relative_error, run_python
from torch import Tensor
from torch.testing import assert_close

from archs.layers import deform_torch
from archs.layers.deform import deform_attend, deform_dot, deform_sum
from archs.layers.deform_attention import DeformableAttention
from archs.layers.deform_backends import choice
from archs.layers.deform_kernel import DOT, SUM, TAPS

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

on_a_gpu = pytest.mark.gpu
IMPORTABLE = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); "  # these files, in a fresh interpreter


@pytest.fixture
def interpreted(monkeypatch) -> None:
    """Sample with Triton alone, in its interpreter."""
    if torch.cuda.is_available():
        pytest.skip("this process compiles kernels for the GPU: -m gpu tests them there")
    use("triton", monkeypatch)


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if choice("cuda").sampling != "triton":
        pytest.skip("Triton does not work here")
    return "cuda"


def attention_case(groups: int = 2, channels: int = 3, size: tuple[int, int] = (3, 4), taps: int = 9) -> list[Tensor]:
    """query, key, value, displacement and weight for two images."""
    x, query, displacement, weight = random_case(groups, size, taps=taps, channels=channels)
    value = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return [query, x, value, 0.5 * displacement, weight]  # not too many places outside


def attention(sample: Callable[..., Any], case: list[Tensor], top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Answer, relevances, taps, and the gradients of all five inputs."""
    inputs = with_gradients(case)
    results = sample(*inputs, top_k)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(y.shape, generator=generator).to(y) for y in results[:2]]
    return list(results), list(torch.autograd.grad(results[:2], inputs, along))


def assert_attention_agrees(case: list[Tensor], top_k: int, atol: float = 1e-4) -> None:
    (answer, best, taps), gradients = attention(deform_attend, case, top_k)
    oracle = lambda *inputs: deform_torch.attend(deform_torch.sample, *inputs)  # noqa: E731
    (answer_too, best_too, taps_too), gradients_too = attention(oracle, case, top_k)
    assert_close(answer, answer_too, atol=atol, rtol=atol)
    assert_close(best, best_too, atol=atol, rtol=atol)
    relevance = deform_torch.sample(DOT, case[1], case[0], *case[3:])
    assert_close(relevance.gather(1, taps), relevance.gather(1, taps_too), atol=atol, rtol=atol)  # not taps: of equals
    for name, a, b in zip(("query", "key", "value", "displacement", "weight"), gradients, gradients_too, strict=True):
        assert_close(a, b, atol=atol, rtol=atol, msg=lambda text, name=name: f"gradient of {name}: {text}")


# ---- in the interpreter


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("groups", "size", "channels"), [(1, (5, 4), 1), (2, (3, 7), 3), (1, (1, 3), 2)])
def test_values_and_gradients(interpreted, groups, size, channels, operation):
    assert_as_defined(random_case(groups, size, channels=channels), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_several_programs_share_the_pixels(interpreted, operation, monkeypatch):
    """More pixels than one program takes, the last of which is not full."""
    inputs = with_gradients(random_case(1, (7, 6), taps=1, channels=5))
    ours, _ = OPERATIONS[operation]
    kernel = list(values_and_gradients(ours(*inputs), inputs))
    use("torch", monkeypatch)
    for a, b in zip(kernel, values_and_gradients(ours(*inputs), inputs), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("far", [-1e6, -7.5, 7.5, 1e6])
def test_far_outside_is_zero(interpreted, far):
    case = random_case(1, (3, 4))
    case[2][:, :, :, 0] = far
    inputs = with_gradients(case)
    for ours, _ in OPERATIONS.values():
        assert all(not tensor.any() for tensor in values_and_gradients(ours(*inputs), inputs))


@pytest.mark.parametrize("mode", [TAPS, SUM, DOT])
def test_any_strides(interpreted, mode):
    """Offsets of a channels-last network, and weights that are one number for all pixels."""
    from archs.layers import deform_triton

    x, query, displacement, _ = random_case(2, (3, 4))
    inputs = with_gradients([x, query, displacement])
    last = inputs[2].flatten(1, 3).contiguous(memory_format=torch.channels_last).unflatten(1, displacement.shape[1:4])
    same = torch.full((), 0.5, requires_grad=True)
    weight = same.expand(2, 2, 2, 3, 4)
    assert not last.is_contiguous() and not any(weight.stride())
    ours = deform_triton.sample(mode, inputs[0], inputs[1], last, weight)
    oracle = deform_torch.sample(mode, inputs[0], inputs[1], inputs[2], weight)
    for a, b in zip(*(values_and_gradients(y, [*inputs, same]) for y in (ours, oracle)), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bf16_is_close_to_float(interpreted):
    """Only ``x`` and ``query`` are rounded, and what is written; sums are float32."""
    x, query, displacement, weight = random_case(1, (3, 20), channels=4)
    half = [x.bfloat16().requires_grad_(), query.bfloat16().requires_grad_()]
    full = [tensor.detach().float().requires_grad_() for tensor in half]
    for name, (ours, _) in OPERATIONS.items():
        result, expected = ours(*half, displacement, weight), ours(*full, displacement, weight)
        assert result.dtype == (torch.float32 if name == "dot" else torch.bfloat16)
        pairs = zip(values_and_gradients(result, half), values_and_gradients(expected, full), strict=True)
        assert all(relative_error(a, b) < 8e-3 for a, b in pairs if b.any())


@pytest.mark.parametrize(
    ("groups", "channels", "taps", "top_k"), [(2, 3, 9, 2), (1, 5, 9, 1), (1, 2, 4, 3), (1, 1, 2, 2)]
)
def test_attention_agrees(interpreted, groups, channels, taps, top_k):
    assert_attention_agrees(attention_case(groups, channels, taps=taps), top_k)


def test_attention_outside_of_the_image_is_nothing(interpreted):
    """All taps are equal then, and any of them may be called the best."""
    case = attention_case(1, 2)
    case[3][:, :, :, 1] = 50
    (answer, best, taps), gradients = attention(deform_attend, case, 2)
    assert not answer.any() and not best.any() and all(not gradient.any() for gradient in gradients)
    assert (taps.sort(1).values.diff(dim=1) > 0).all() and taps.min() >= 0 and taps.max() < 9


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
def test_attention_survives_nan(interpreted):
    """A training that has diverged must say so, not read somewhere else in memory."""
    query, key, *others = attention_case(1, 2)
    key[0, 0, 1, 1] = float("nan")
    answer, best, taps = deform_attend(query, key, *others, 2)
    assert answer[0].isnan().any() and answer[1].isfinite().all() and best.sort(1, descending=True).values.equal(best)
    assert taps.min() >= 0 and taps.max() < 9


def test_attention_in_bf16(interpreted, monkeypatch):
    *images, displacement, weight = attention_case(1, 4, (3, 9))
    half = [image.bfloat16() for image in images]
    answer, best, _ = deform_attend(*half, displacement, weight, 2)
    assert answer.dtype == torch.bfloat16 and best.dtype == torch.float32
    use("torch", monkeypatch)
    expected = deform_attend(*(image.float() for image in half), displacement, weight, 2)
    assert relative_error(best, expected.best) < 1e-5 and relative_error(answer, expected.answer) < 4e-3


def test_the_module_is_the_same_with_any_backend(interpreted, monkeypatch):
    torch.manual_seed(0)
    module = DeformableAttention(2, 4, 1)
    torch.nn.init.normal_(module.offsets.conv.weight, std=0.2)
    features = torch.randn(1, 2, 2, 3, 4)
    results = []
    for name in ("triton", "torch"):
        with monkeypatch.context() as patch:
            use(name, patch)
            module.zero_grad()
            y = module(features)
            y.square().sum().backward()
            results.append([y.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_operators_are_registered_right(interpreted):
    """Schema, shapes without data and autograd, as `torch.compile` relies on them."""
    from archs.layers.deform_triton import channels_last, deform_triton
    from archs.layers.deform_triton_attention import attend_triton

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, query, displacement, weight = random_case(1, (3, 4), taps=1)
    images = [channels_last(image).contiguous() for image in (x, query)]
    for mode in (TAPS, SUM, DOT):
        inputs = (*with_gradients([*images, displacement, weight]), mode)
        torch.library.opcheck(deform_triton, inputs, test_utils=checks)
    images = [channels_last(image).contiguous() for image in (query, x, x)]
    inputs = (*with_gradients([*images, displacement, weight]), 1)
    torch.library.opcheck(attend_triton, inputs, test_utils=checks)


def test_compiled_without_a_break(interpreted):
    """Also where nothing has run before, so that the compiler itself asks for the choice."""
    code = IMPORTABLE + """
import torch
from test_deform_triton import attention_case
from archs.layers.deform import deform_attend, deform_sample
from archs.layers.deform_backends import choice
case = attention_case(1, 2)
work = lambda query, key, value, *where: (*deform_attend(query, key, value, *where, 2), deform_sample(key, *where))
compiled = torch.compile(work, fullgraph=True, backend="eager")(*case)
assert str(choice("cpu")) == "triton"
for a, b in zip(compiled, work(*case), strict=True): torch.testing.assert_close(a, b)
"""
    done = run_python(code, RESTORE_DEFORM="triton")
    assert done.returncode == 0, done.stderr


def test_kernels_compile(tmp_path):
    """For an NVIDIA GPU of 2022, which need not be here, in the types of float32 and bfloat16 features."""
    code = f"{IMPORTABLE}import test_deform_triton; test_deform_triton.compile_kernels()"
    done = run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


def compile_kernels() -> None:
    """Every kernel to machine code; raises what the compiler says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from archs.layers import deform_triton, deform_triton_attention

    small = {"block": 32, "lanes": 2}
    pointers = {"best_out": "*fp32", "best_in": "*fp32", "gbest": "*fp32", "taps_out": "*i64", "taps_in": "*i64"}
    pointers |= dict.fromkeys(("displacement", "weight", "gdisplacement", "gweight"), "*fp32")
    pointers |= dict.fromkeys(("gx", "gkey", "gvalue"), "*fp32")
    for features, mode in (("*fp32", TAPS), ("*bf16", DOT)):  # SUM is in between
        of_mode = {"mode": mode, "taps": 9, **small}
        relevance = {"y": "*fp32", "gy": "*fp32"} if mode == DOT else {}
        kernels = [
            (deform_triton._forward, {**of_mode, "slots": 16}, relevance),
            (deform_triton._backward, of_mode, relevance),
        ]
        if mode == DOT:
            of_attention = {"top_k": 2, "choices": 2, **small}
            kernels += [
                (deform_triton_attention._forward, {**of_attention, "taps": 9, "slots": 16}, {}),
                (deform_triton_attention._backward, of_attention, {}),
            ]
        images = dict.fromkeys(("x", "query", "key", "value", "y", "gy", "gquery"), features)
        for kernel, constants, others in kernels:
            types = {**images, **pointers, **others, **dict.fromkeys(constants, "constexpr")}
            signature = {name: types.get(name, "i32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


# ---- on a GPU


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [TAPS, SUM, DOT])
@pytest.mark.parametrize(("groups", "channels", "size"), [(8, 8, (64, 112)), (8, 9, (45, 61)), (1, 64, (17, 33))])
def test_sampling_on_a_gpu(device, groups, channels, size, mode, dtype):
    from archs.layers import deform_triton

    case = [tensor.to(device) for tensor in random_case(groups, size, taps=9, channels=channels)]
    case[:2] = [image.to(dtype) for image in case[:2]]
    ours, oracle = ([tensor.clone().requires_grad_() for tensor in case] for _ in range(2))
    result, expected = deform_triton.sample(mode, *ours), deform_torch.sample(mode, *oracle)
    along = torch.randn_like(expected)
    gradients = torch.autograd.grad(result, ours, along, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(expected, oracle, along, allow_unused=True, materialize_grads=True)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip((result, *gradients), (expected, *truth), strict=True):
        assert relative_error(a, b) < bound if b.any() else not a.any()


@on_a_gpu
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("groups", "channels", "size"), [(8, 9, (64, 112)), (4, 8, (45, 61)), (1, 5, (1, 7))])
def test_attention_on_a_gpu(device, groups, channels, size, top_k):
    from archs.layers import deform_triton_attention

    case = [tensor.to(device) for tensor in attention_case(groups, channels, size)]
    ours, oracle = ([tensor.clone().requires_grad_() for tensor in case] for _ in range(2))
    answer, best, _ = deform_triton_attention.attend(*ours, top_k)
    expected = deform_torch.attend(deform_torch.sample, *oracle, top_k)
    assert relative_error(answer, expected[0]) < 1e-4 and relative_error(best, expected[1]) < 1e-4
    along = torch.randn_like(answer), torch.randn_like(best)
    gradients = torch.autograd.grad((answer, best), ours, along)
    for a, b in zip(gradients, torch.autograd.grad(expected[:2], oracle, along), strict=True):
        assert relative_error(a, b) < 1e-3


@on_a_gpu
def test_autocast_on_a_gpu_leaves_positions_alone(device):
    x, query, displacement, weight = (tensor.to(device) for tensor in random_case(1, (4, 300)))
    with torch.autocast("cuda", torch.bfloat16):
        result = deform_sum(x, displacement, weight), deform_dot(x, query, displacement, weight)
    assert_close(result, (deform_sum(x, displacement, weight), deform_dot(x, query, displacement, weight)))


@on_a_gpu
def test_a_graph_of_the_attention_is_replayed(device):
    """CUDA graphs: no synchronisation, no allocation outside of the graph's pool."""
    case = [tensor.to(device) for tensor in attention_case(8, 9, (16, 24))]
    expected = deform_attend(*case, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = deform_attend(*case, 2)
    result.answer.zero_()
    graph.replay()
    assert_close(result.answer, expected.answer)


@on_a_gpu
def test_the_network_is_the_same_with_any_backend(device, monkeypatch):
    import test_contract

    network = test_contract.build("stdan").to(device).requires_grad_(False)
    clip = test_contract.clip_for(network, frames=3).to(device)
    ours = network(clip)
    use("torch", monkeypatch)
    assert relative_error(ours, network(clip)) < 1e-3
