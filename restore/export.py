"""Networks for other programs: python -m restore.export NETWORK -o FILE.pt2 (torch.export) or FILE.onnx.

    python -m restore.export stdan_s -o stdan_s.onnx --frames 4 --height 128 --width 128

An exported network takes clips of one size, (1, T, 3, h, w), float32 RGB in [0, 1]; `docs/export.md` tells how to run
it. It is written only if it does on a seeded clip what the network does, to 0.001. Deformable sampling is exported in
its PyTorch formulation, spectra go into an ONNX file as in `restore.real_graph`.
"""

import argparse
import hashlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from archs import ARCHS, VideoNet
from restore.checkpoint import find_weights, load_network, read_info, replacing
from restore.real_graph import RealGraph, UnknownOperationError, has_spectra, module_of

SUFFIXES = (".pt2", ".onnx")
OPSET = 18  # of ONNX; the least that PyTorch's exporter writes without converting
TOLERANCE = 1e-3  # a quarter of an 8-bit level
METADATA = "restore.json"  # its name among the extra files of a .pt2


class ExportError(ValueError):
    """A network that cannot be exported as asked; the message says why, and the way out."""


def export(network: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """The network in eval mode and float32, as a program for ``inputs`` of these sizes.

    `ExportError` for a network that has something that cannot be traced.
    """
    try:
        with torch.no_grad(), _without_autocast(), _quiet():
            return torch.export.export(network, inputs, strict=False)
    except Exception as error:  # the tracer raises whatever it met
        raise ExportError(f"{type(network).__name__} cannot be traced by torch.export: {_first_line(error)}") from error


def to_pt2(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The content of a .pt2 file, with ``metadata`` as JSON under `METADATA` among its extra files."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_onnx(program: ExportedProgram, clip: Float[Tensor, "b t 3 h w"], metadata: Mapping[str, Any]) -> bytes:
    """The content of an .onnx file, input "clip", output "restored", with ``metadata`` as its properties.

    `ExportError` if the packages are missing, or for an operation that ONNX does not have.
    """
    _require("onnx", "onnxscript")
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    instead = "export to a .pt2, or train without that component"
    try:
        with torch.no_grad(), _quiet():
            real = torch.export.export(RealGraph(program), (clip,), strict=False) if has_spectra(program) else program
            result = torch.onnx.export(
                real, (clip,), input_names=["clip"], output_names=["restored"], opset_version=OPSET, dynamo=True,
                verbose=False, custom_translation_table={torch.ops.aten.conv3d.default: _conv3d},
                optimize=False,  # which would leave out the addition of 1e-8 and less: 0 / 0 where a band is empty
            )  # fmt: skip
            assert result is not None
            fold_constants(result.model)
            remove_unused_nodes(result.model)
    except UnknownOperationError as error:
        raise ExportError(f"{_first_line(error)}; {instead}") from error
    except Exception as error:  # of many kinds, and around many causes
        raise ExportError(f"{_missing_operation(error, program)}; {instead}") from error
    properties = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    result.model.metadata_props.update(properties)
    return result.model_proto.SerializeToString()


def _conv3d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """For ONNX; onnxscript 0.7 makes a bias of two dimensions where there is none."""
    from onnxscript import opset18

    strides, pads, dilations = ([n] * 3 if isinstance(n, int) else list(n) for n in (stride, padding, dilation))
    return opset18.Conv(x, weight, bias, strides=strides, pads=pads * 2, dilations=dilations, group=groups)


def run_pt2(content: bytes, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b u 3 H W"]:
    """What a .pt2 file makes of a clip."""
    with torch.no_grad(), _quiet():
        return torch.export.load(io.BytesIO(content)).module()(clip)


def run_onnx(content: bytes, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b u 3 H W"]:
    """What an .onnx file makes of a clip, by onnxruntime on the CPU. `ExportError` where that is not installed."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are of constants that it could not fold
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"clip": clip.numpy()})[0])
    except Exception as error:  # its own kinds, which have no common base
        raise ExportError(f"onnxruntime cannot run the exported network: {_first_line(error)}") from error


def seeded_clip(frames: int, height: int, width: int) -> Float[Tensor, "1 {frames} 3 {height} {width}"]:
    """A smooth texture that moves by a pixel a frame.

    Noise would be no fair check: where nothing matches, the best of several equal matches is a matter of rounding.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, (height + frames) // 4 + 2, (width + frames) // 4 + 2, generator=generator)
    texture = F.interpolate(noise, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.stack([texture[..., t : t + height, t : t + width] for t in range(frames)], dim=1)


def write(name: str, path: Path, *, frames: int, height: int, width: int) -> tuple[dict[str, Any], float]:
    """Export a network by a shipped model's name or a file of weights to ``path``; its metadata, and the difference.

    The difference is the largest one in the seeded clip's output. `ExportError`, and no file, where it exceeds
    `TOLERANCE`, for a size that does not fit and for a network that cannot be exported.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path}: the suffix says which format: {' or '.join(SUFFIXES)}")
    _require(*(("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ()))
    network = load_network(name).requires_grad_(False)
    _check_window(network, frames, height, width)
    clip = seeded_clip(frames, height, width)
    metadata = describe(name, network, clip)
    program = export(network, clip)
    content = to_onnx(program, clip, metadata) if path.suffix == ".onnx" else to_pt2(program, metadata)
    run = run_onnx if path.suffix == ".onnx" else run_pt2
    with torch.no_grad():
        difference = float((run(content, clip) - network(clip)).abs().max())
    if not difference <= TOLERANCE:  # nor is NaN
        raise ExportError(
            f"{path}: not written: its output would differ from the network's by up to {difference:.2g}, "
            f"more than {TOLERANCE:g}; try the other format"
        )
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return metadata, difference


def describe(name: str, network: VideoNet, clip: Float[Tensor, "b t 3 h w"]) -> dict[str, Any]:
    """What an exported file says of itself: network and its options, its factors, the clip's size, the weights."""
    path = find_weights(name)
    if path.suffix == ".safetensors":
        options = read_info(path)["network"]
    else:  # a published network, which has the defaults
        options = {"type": next(key for key, arch in ARCHS.items() if arch is type(network))}
    return {
        "network": options,
        "weights": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scale": network.scale,
        "time_scale": network.time_scale,
        "frames": clip.shape[1],
        "height": clip.shape[-2],
        "width": clip.shape[-1],
    }


def _check_window(network: VideoNet, frames: int, height: int, width: int) -> None:
    multiple = network.multiple_of
    if frames < network.min_frames:
        raise ExportError(f"--frames {frames}: this network needs at least {network.min_frames}")
    if min(height, width) < 1 or height % multiple or width % multiple:
        nearest = [max(-(-length // multiple), 1) * multiple for length in (height, width)]
        raise ExportError(
            f"--height {height} --width {width}: this network needs multiples of {multiple}, "
            f"such as --height {nearest[0]} --width {nearest[1]}"
        )


@contextmanager
def _without_autocast() -> Iterator[None]:
    """No regions without autocast in a program that has none anyway: tracing takes three times as long with them."""
    region = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = region  # type: ignore[misc]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporters have to say about their own code."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ExportError(f".onnx files need {' and '.join(missing)}: pip install {' '.join(missing)}, or write a .pt2")


def _missing_operation(error: BaseException, program: ExportedProgram) -> str:
    """Which operation ONNX does not have, and in which module of the network, as far as the exporter tells."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = re.search(r"op='([\w.]+)'", str(error))
    if found is None:
        return f"the ONNX exporter failed: {_first_line(error)}"
    operation = found[1].rpartition(".")[2]
    places = (f"{module_of(node)}: " for node in program.graph.nodes if operation in str(node.target))
    return f"{next(places, '')}ONNX has no {found[1]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Export a network; 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m restore.export", description="Export a network for clips of one size, and check what it does."
    )
    parser.add_argument("network", metavar="NETWORK", help="name of a shipped model, or file of weights")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="FILE.pt2 or FILE.onnx")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip (%(default)s)")
    parser.add_argument("--height", type=int, default=128, help="of the input's frames, pixels (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="the same (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    try:
        if args.output.exists() and not args.overwrite:
            raise ExportError(f"{args.output}: exists; replace it with --overwrite")
        metadata, difference = write(
            args.network, args.output, frames=args.frames, height=args.height, width=args.width
        )
    except (ValueError, OSError) as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    size = "clips of {frames} x {height}x{width}".format(**metadata)
    opset = f", opset {OPSET}" if args.output.suffix == ".onnx" else ""
    print(f"{args.output}: {args.network} for {size}{opset}; largest difference from the network {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
