"""An exported graph without complex numbers: for ONNX, which has none, and runtimes without Fourier transforms.

A complex tensor becomes a `Pair` of its real and its imaginary part, and every operation on it one on these: the same
on both parts where it is linear, four terms where it is a product. A Fourier transform becomes a product with cosines
and sines: O(n^2) instead of O(n log n) for n pixels in a row, but of fixed size, and every runtime does it well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from archs.layers.spectral import multiplicity

PRODUCTS = {"mul", "einsum", "matmul"}
LINEAR = {  # besides products with real tensors and sums of complex ones
    *("flatten", "unflatten", "view", "view_as", "reshape", "expand", "expand_as", "permute", "transpose", "movedim"),
    *("unsqueeze", "squeeze", "slice", "select", "index", "index_select", "unbind", "split", "chunk", "getitem"),
    *("clone", "contiguous", "detach", "neg", "sum", "mean", "div"),
}


class UnknownOperationError(ValueError):
    """An operation on complex numbers that has no real form here; the message says which, and where it is used."""


@dataclass(frozen=True)
class Pair:
    """A complex tensor, or a tuple of them."""

    real: Any
    imag: Any


class RealGraph(nn.Module):
    """The network of an exported program without complex numbers, to be exported again: same input, same output.

    It knows orthonormal transforms of all samples in a direction, which are those of `archs`.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.network = program.module()
        for node in program.graph.nodes:
            for length in _transformed(node):
                self._tabulate(length)

    def forward(self, *inputs: Tensor) -> Any:
        """As the network's."""
        return _Interpreter(self.network, dict(self.named_buffers(recurse=False))).run(*inputs)

    def _tabulate(self, length: int) -> None:
        turns = torch.arange(length)[:, None] * torch.arange(length) % length  # as integers: exact
        angle = turns.double() * (2 * pi / length)
        self.register_buffer(f"cos{length}", (angle.cos() / sqrt(length)).float())
        self.register_buffer(f"sin{length}", (angle.sin() / sqrt(length)).float())


def has_spectra(program: ExportedProgram) -> bool:
    """Whether a program computes with spectra, for which ONNX lacks operations."""
    return any(_name(node.target).startswith("fft_") for node in program.graph.nodes)


def module_of(node: fx.Node) -> str:
    """The path in the network of the innermost module that an operation belongs to."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return paths[-1] if paths and paths[-1] else "the network"


class _Interpreter(fx.Interpreter):
    """Runs a graph with a `Pair` for every complex tensor."""

    def __init__(self, network: fx.GraphModule, tables: dict[str, Tensor]) -> None:
        super().__init__(network)
        self.tables = tables
        self.special: dict[str, Callable[..., Any]] = {
            "fft_rfft": self._rfft, "fft_rfft2": self._rfft2, "fft_ifft": self._ifft, "fft_irfft": self._irfft,
            **_SPECIAL,
        }  # fmt: skip

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except UnknownOperationError as error:
            raise UnknownOperationError(f"{module_of(n)}: {error}") from None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, pairs = _name(target), list(_pairs(args))
        if name in self.special and (pairs or name in _MAKE):
            return self.special[name](*args, **kwargs)
        if not pairs:
            return super().call_function(target, args, kwargs)

        def apply(*parts: Any) -> Any:
            return target(*_replaced(args, iter(parts)), **kwargs)

        if len(pairs) == 2 and name in PRODUCTS:
            a, b = pairs
            return Pair(apply(a.real, b.real) - apply(a.imag, b.imag), apply(a.real, b.imag) + apply(a.imag, b.real))
        if not _is_linear(name, args, len(pairs)):
            raise UnknownOperationError(f"{target} of complex numbers has no real form")
        return Pair(apply(*(pair.real for pair in pairs)), apply(*(pair.imag for pair in pairs)))

    def _rfft2(self, x: Tensor, size: None, dim: list[int], norm: str) -> Pair:
        _check(size is None and len(dim) == 2, "fft_rfft2")
        return self._full(self._rfft(x, None, dim[1], norm), dim[0], sign=-1)

    def _rfft(self, x: Tensor, length: None, dim: int, norm: str) -> Pair:
        _check(length is None and norm == "ortho", "fft_rfft")
        cos, sin = (table[:, : x.shape[dim] // 2 + 1] for table in self._tables(x.shape[dim]))
        return Pair(_along(x, dim, cos), -_along(x, dim, sin))

    def _ifft(self, x: Pair, length: None, dim: int, norm: str) -> Pair:
        _check(length is None and norm == "ortho", "fft_ifft")
        return self._full(x, dim, sign=1)

    def _full(self, x: Pair, dim: int, sign: int) -> Pair:
        """The transform of complex samples; ``sign`` is that of the exponent."""
        cos, sin = self._tables(x.real.shape[dim])
        return Pair(
            _along(x.real, dim, cos) - sign * _along(x.imag, dim, sin),
            _along(x.imag, dim, cos) + sign * _along(x.real, dim, sin),
        )

    def _irfft(self, x: Pair, length: int, dim: int, norm: str) -> Tensor:
        """The sine is zero at the frequencies 0 and 1/2, so that imaginary parts there do not count.

        `archs.layers.spectral.irfft2` overwrites them with zeros, in memory that a `Pair` does not share.
        """
        half = length // 2 + 1
        _check(norm == "ortho" and x.real.shape[dim] == half, "fft_irfft")
        twice = multiplicity(length)[:, None]
        cos, sin = (twice * table[:half] for table in self._tables(length))
        return _along(x.real, dim, cos) - _along(x.imag, dim, sin)

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        return self.tables[f"cos{length}"], self.tables[f"sin{length}"]


def _transformed(node: fx.Node) -> list[int]:
    """The numbers of samples that a node transforms in its directions; none if it is no Fourier transform."""
    arguments: tuple[Any, ...] = node.args
    match _name(node.target):
        case "fft_rfft" | "fft_ifft":
            return [arguments[0].meta["val"].shape[arguments[2]]]
        case "fft_rfft2":
            return [arguments[0].meta["val"].shape[dim] for dim in arguments[2]]
        case "fft_irfft":
            return [arguments[1]]
    return []


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """``x`` times ``matrix`` in one direction, without moving the others."""
    dim %= x.ndim
    if dim == x.ndim - 1:
        return x @ matrix
    return (matrix.T @ x.flatten(dim + 1)).unflatten(-1, x.shape[dim + 1 :])


def _fftfreq(n: int, d: float = 1.0, **options: Any) -> Tensor:
    index = torch.arange(n)
    return torch.where(index < (n + 1) // 2, index, index - n) / (n * d)


def _rfftfreq(n: int, d: float = 1.0, **options: Any) -> Tensor:
    return torch.arange(n // 2 + 1) / (n * d)


def _to(x: Pair, dtype: torch.dtype, *options: Any) -> Pair:
    _check(dtype == torch.complex64, "to")
    return x


_MAKE = {"complex", "view_as_complex", "fft_rfft", "fft_rfft2", "fft_fftfreq", "fft_rfftfreq"}  # of real numbers
_SPECIAL: dict[str, Callable[..., Any]] = {
    "fft_fftfreq": _fftfreq,
    "fft_rfftfreq": _rfftfreq,
    "complex": Pair,
    "view_as_complex": lambda x: Pair(*x.unbind(-1)),
    "view_as_real": lambda x: torch.stack([x.real, x.imag], -1),
    "real": lambda x: x.real,
    "imag": lambda x: x.imag,
    "abs": lambda x: (x.real.square() + x.imag.square()).sqrt(),
    "_conj": lambda x: Pair(x.real, -x.imag),
    "to": _to,
    "_assert_tensor_metadata": lambda *_, **__: None,
}


def _is_linear(name: str, args: tuple[Any, ...], complex_ones: int) -> bool:
    """Whether an operation of so many complex tensors is the same on their real and on their imaginary parts."""
    if any(isinstance(value, complex) for value in args):
        return False
    if name in ("add", "sub"):
        return complex_ones == 2
    if name in ("cat", "stack"):
        return complex_ones == len(args[0])
    if name in PRODUCTS:
        return complex_ones == 1
    return name in LINEAR and isinstance(args[0], Pair) and (complex_ones == 1 or name in ("view_as", "expand_as"))


def _check(known: bool, operation: str) -> None:
    if not known:
        raise UnknownOperationError(f"aten.{operation} with such arguments has no real form")


def _name(target: Any) -> str:
    """``mul`` for ``aten.mul.Tensor``; also of what is no operation of aten."""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return getattr(packet, "__name__", str(packet))


def _pairs(value: Any) -> Iterator[Pair]:
    """Those in a tree of arguments, in order."""
    if isinstance(value, Pair):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _pairs(part)


def _replaced(value: Any, parts: Iterator[Any]) -> Any:
    """A tree of arguments with ``parts`` for its pairs, in order."""
    if isinstance(value, Pair):
        return next(parts)
    return type(value)(_replaced(part, parts) for part in value) if isinstance(value, (list, tuple)) else value
