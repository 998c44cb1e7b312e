"""Networks and kernels on an NVIDIA card: python -m bench.gpu [stdan stdan_freq_s ...] [--json FILE].

First the card's limits, measured in the same run: the rate of a plain 3x3 convolution (64 -> 64, 256 x 448,
channels-last) in each precision, and of copying memory. Then networks, one window of 4 x 64 x 112 -> 7 x 256 x 448 in
float32, tf32 and bf16, called eagerly, compiled, and as a replayed CUDA graph, as a share of what the convolution's
rate would allow. Then deformable sampling by every backend, forward and backward: its largest error against PyTorch's
formulation, and the share of what copying memory would allow. Not run on hardware yet. Exit code 2 without a card.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archs import ARCHS, VideoNet
from archs.layers import deform_torch
from archs.layers.deform_backends import BACKENDS, choice
from archs.layers.deform_kernel import DOT, SUM, TAPS
from restore.checkpoint import load_network
from restore.cost import best_seconds, count_gmac
from restore.device import autocast

PRECISIONS = ("fp32", "tf32", "bf16")
Row = dict[str, Any]


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """float32 without or with tf32, or autocast to bf16 over the former."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with autocast(device, "bf16") if precision == "bf16" else nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def convolution_gflops(precision: str, device: torch.device, size: tuple[int, int] = (256, 448)) -> float:
    """Rate of the reference convolution."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = (
        torch.rand(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        for shape in ((8, 64, *size), (64, 64, 3, 3))
    )
    with computing_in(precision, device):
        seconds = best_seconds(lambda: F.conv2d(x, weight, padding=1), 20, device)
    return 2 * 8 * 64 * 64 * 9 * size[0] * size[1] / seconds / 1e9


def copy_gbytes(device: torch.device, elements: int = 2**28) -> float:
    """Bytes a second, in 1e9, read and written by a copy."""
    source = torch.empty(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), 20, device) / 1e9


def _graph(network: VideoNet, clip: Tensor) -> Callable[[], object]:
    """The network's work on ``clip`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(clip)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(clip)
    return graph.replay


def _compiled(network: VideoNet, clip: Tensor) -> Callable[[], object]:
    torch._dynamo.reset()
    return partial(torch.compile(network, fullgraph=True), clip)


CALLS: dict[str, Callable[[VideoNet, Tensor], Callable[[], object]]] = {
    "eager": lambda network, clip: partial(network, clip),
    "compiled": _compiled,
    "graph": _graph,
}


def network_rows(
    name: str, device: torch.device, rates: dict[str, float], runs: int, calls: Sequence[str] = tuple(CALLS),
    size: tuple[int, int] = (64, 112),
) -> Iterator[Row]:  # fmt: skip
    """One row for every precision and way to call; what a way cannot do is said in its row."""
    network: VideoNet = ARCHS[name]().eval() if name in ARCHS else load_network(name)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    gmac = count_gmac(network, 4, *size)
    clip = torch.rand(1, 4, 3, *size, device=device)
    for precision, rate in rates.items():
        for call in calls:
            row: Row = {"network": name, "precision": precision, "call": call}
            try:
                with torch.inference_mode(), computing_in(precision, device):
                    seconds = best_seconds(CALLS[call](network, clip), runs, device)
            except Exception as error:  # of many kinds: compilers, captures, memory
                yield row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
                continue
            limit = 2 * gmac / rate
            yield row | {"ms": 1e3 * seconds, "frames_per_s": 7 / seconds, "share_of_limit": limit / seconds}


def sampling_case(
    device: torch.device, dtype: torch.dtype, *, batch: int, channels: int, groups: int, size: tuple[int, int]
) -> list[Tensor]:
    """Three images, displacements of about two pixels, weights in 0..1, of nine taps."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, channels, *size, generator=generator) for _ in range(3)]
    displacement = 2 * torch.randn(batch, groups, 9, 2, *size, generator=generator)
    weight = torch.rand(batch, groups, 9, *size, generator=generator)
    places = [tensor.to(device).requires_grad_() for tensor in (displacement, weight)]
    last = [image.to(device, dtype, memory_format=torch.channels_last).requires_grad_() for image in images]
    return [*last, *places]


def _jobs(name: str) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """What a backend does, as functions of a `sampling_case`."""
    backend, jobs = BACKENDS[name], {}
    if (sample := backend.sample) is not None:
        for job, mode in (("taps", TAPS), ("sum", SUM), ("dot", DOT)):
            jobs[job] = lambda case, mode=mode: sample(mode, case[0], case[1], *case[3:])
        attend = backend.attend or partial(deform_torch.attend, sample)
        jobs["attend"] = lambda case: attend(case[1], case[0], case[2], *case[3:], 2)[0]
    return jobs


def kernel_rows(
    device: torch.device, dtype: torch.dtype, bandwidth: float, runs: int, **case_arguments: Any
) -> Iterator[Row]:
    """Time, error and share of the memory's rate of every backend that samples on the device."""
    case = sampling_case(device, dtype, **case_arguments)
    oracle = _jobs("torch")
    used = {"allow_unused": True, "retain_graph": True}
    for name in BACKENDS:
        if BACKENDS[name].missing(device.type):
            continue
        for job, work in _jobs(name).items():
            y, truth = work(case), oracle[job](case)
            along = torch.randn(truth.shape, device=device).to(truth)
            gradients, expected = (torch.autograd.grad(out, case, along, **used) for out in (y, truth))
            pairs = [(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None]
            with torch.no_grad():
                forward = best_seconds(lambda work=work: work(case), runs, device)
            backward = best_seconds(lambda y=y, g=along: torch.autograd.grad(y, case, g, **used), runs, device)
            images = {"taps": 1, "sum": 1, "dot": 2, "attend": 3}[job]
            moved = sum(tensor.nbytes for tensor in (*case[:images], *case[3:], y))
            yield {
                "job": job, "backend": name, "dtype": str(dtype).removeprefix("torch."), **case_arguments,
                "max_error": _largest(y, truth), "max_gradient_error": max(_largest(a, b) for a, b in pairs),
                "forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward,
                "share_of_copy": moved / forward / (1e9 * bandwidth),
            }  # fmt: skip


def _largest(a: Tensor, b: Tensor) -> float:
    """Difference, relative to the largest value."""
    return float((a.detach().float() - b.detach().float()).abs().max() / b.detach().float().abs().max())


def _print(row: Row) -> None:
    cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), flush=True)


def _rows(names: Sequence[str], device: torch.device, runs: int) -> Iterator[Row]:
    rates = {precision: convolution_gflops(precision, device) for precision in PRECISIONS}
    bandwidth = copy_gbytes(device)
    yield {
        "card": torch.cuda.get_device_name(device), "sampling": str(choice(device.type)),
        **{f"convolution_{precision}_gflops": rate for precision, rate in rates.items()}, "copy_gbytes": bandwidth,
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for batch, channels, size in ((6, 64, (64, 112)), (6, 72, (64, 112)), (1, 64, (180, 320))):
            case = {"batch": batch, "channels": channels, "groups": 8, "size": size}
            yield from kernel_rows(device, dtype, bandwidth, runs, **case)
    for name in names:
        yield from network_rows(name, device, rates, runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a row; 2 where there is no card."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Networks and kernels on an NVIDIA card.")
    parser.add_argument("networks", nargs="*", default=["stdan", "stdan_s", "stdan_freq_s"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: error: there is no CUDA device; python -m bench.speed measures a CPU", file=sys.stderr)
        return 2
    rows = []
    for row in _rows(arguments.networks, torch.device("cuda"), arguments.runs):
        rows.append(row)
        _print(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
