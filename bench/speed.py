"""Time of networks on this machine: python -m bench.speed [stdan stdan_freq_s ...] [--precision bf16] [--threads 2].

One window of 4 x 64 x 112 -> 7 x 256 x 448, best of several runs, beside a plain 3x3 convolution of the same run
(64 -> 64 channels, 256 x 448, channels-last): quote ratios, since machines are shared and noisy. Names are entries of
ARCHS (random weights, published size) or shipped models and files.
"""

import argparse
import json

import torch
from torch.nn import functional as F

from archs import ARCHS, VideoNet
from restore.checkpoint import load_network
from restore.cost import best_seconds, count_gmac, count_parameters
from restore.device import autocast
from restore.memory import keep_freed_memory, peak_memory_mb


def convolution_gflops(precision: str) -> float:
    """Rate of the reference convolution."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = (1, 64, 256, 448), (64, 64, 3, 3)
    x, weight = (torch.rand(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes)
    return 2 * 64 * 64 * 9 * 256 * 448 / best_seconds(lambda: F.conv2d(x, weight, padding=1), 10) / 1e9


def measure(name: str, precision: str, runs: int, rate: float, size: tuple[int, int] = (64, 112)) -> dict[str, object]:
    """Parameters, multiply-adds, seconds and peak memory of one network; ``rate`` in GFLOP/s is the machine's limit."""
    network: VideoNet = ARCHS[name]().eval() if name in ARCHS else load_network(name)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clip = torch.rand(1, 4, 3, *size)
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        seconds = best_seconds(lambda: network(clip), runs)
    gmac = count_gmac(network, 4, *size)
    return {
        "network": name,
        "precision": precision,
        "parameters": count_parameters(network),
        "gmac": round(gmac, 1),
        "seconds": round(seconds, 4),
        "frames_per_s": round(7 / seconds, 1),
        "times_limit": round(seconds / (2 * gmac / rate), 2),
        "peak_mb": peak_memory_mb(),
    }


def main() -> None:
    """Print one JSON line a network and precision."""
    parser = argparse.ArgumentParser(description="Time of networks on this machine.")
    parser.add_argument("networks", nargs="*", default=["stdan", "stdan_s", "stdan_freq_s"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", default="64x112", help="of the input, HxW")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    height, width = map(int, arguments.size.split("x"))
    for precision in arguments.precision:
        rate = convolution_gflops(precision)
        for name in arguments.networks:
            row = measure(name, precision, arguments.runs, rate, (height, width))
            print(json.dumps({**row, "conv_gflops": round(rate)}), flush=True)


if __name__ == "__main__":
    main()
