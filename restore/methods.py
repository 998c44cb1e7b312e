"""What is scored: baselines, networks, and folders that somebody else has restored."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from archs import VideoNet
from archs.layers.blocks import interleave
from restore.checkpoint import find_weights, load_network
from restore.clip_sources import SampleError
from restore.cost import count_gmac, count_parameters
from restore.degrade import imresize
from restore.device import resolve_precision
from restore.frames import Clip as FileClip
from restore.frames import ClipError, open_clips
from restore.protocol import Protocol, Window
from restore.stream import restore_window

# what multiply-adds are counted for: clips whose results are 7 x 256 x 448, the size of Vimeo-90K
COUNTED = (7, 256, 448)


@dataclass(frozen=True)
class Method:
    """Restores the window of a clip: ``restore(lq, clip's name, window)`` gives its frames, at the truth's size."""

    name: str
    restore: Callable[[Float[Tensor, "t 3 h w"], str, Window], Float[Tensor, "u 3 H W"]]
    source: str = ""  # what it is, so that figures saved for something else are not taken for its own
    network: VideoNet | None = field(default=None, repr=False)

    def cost(self) -> dict[str, Any]:
        """Parameters and multiply-adds (1e9 a frame of 256x448, in a window of 7); None where nothing is known."""
        if self.network is None:
            return {"parameters": None, "gmac": None}
        frames, height, width = COUNTED
        network = self.network
        counted = (frames - 1) // network.time_scale + 1, height // network.scale, width // network.scale
        return {"parameters": count_parameters(network), "gmac": count_gmac(network, *counted) / frames}


def baseline(protocol: Protocol) -> Method:
    """The trivial method of a protocol: MATLAB's bicubic in space, the mean of two neighbours in time; or the input."""
    name = "bicubic" if protocol.scale > 1 else "unchanged"  # "input" is the folder of input images
    name += " + average" if protocol.time_scale > 1 else ""
    return Method(name, lambda lq, clip, window: bicubic_average(lq, protocol.scale, protocol.time_scale), name)


def bicubic_average(
    lq: Float[Tensor, "t 3 h w"], scale: int = 4, time_scale: int = 2
) -> Float[Tensor, "u 3 H W"]:
    """MATLAB's bicubic enlargement, and the mean of the two neighbours (before rounding) for frames in between."""
    up = imresize(lq, scale) if scale > 1 else lq
    if time_scale == 1:
        return up
    between = [torch.lerp(up[:-1], up[1:], i / time_scale) for i in range(1, time_scale)]
    if time_scale == 2:
        return interleave(up[None], ((up[:-1] + up[1:]) / 2)[None])[0]
    stacked = torch.stack([up[:-1], *between], dim=1).flatten(0, 1)
    return torch.cat([stacked, up[-1:]])


def network_method(
    name: str, network: VideoNet, device: torch.device, *, tile: int | None = None, precision: str = "fp32",
    source: str = "",
) -> Method:  # fmt: skip
    """A network as the protocol runs it: through the streamer's window, with zero padding."""
    exact = resolve_precision(precision, device)

    def restore(lq: Tensor, clip: str, window: Window) -> Tensor:
        return restore_window(network, lq.to(device), tile=tile, padding="zero", precision=exact).cpu()

    return Method(name, restore, f"{source} {exact} tile={tile}", network)


def load_method(name: str, device: torch.device, *, tile: int | None, precision: str) -> Method:
    """The method of a shipped model's name or a file of weights, named by its stem."""
    path = find_weights(name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    network = load_network(name, device=device)
    return network_method(path.stem, network, device, tile=tile, precision=precision, source=f"{path.name} {digest}")


def folder_method(name: str, root: Path, lengths: dict[str, int]) -> Method:
    """Results on disk: <root>/<clip>/ with a frame for every true one, in order, or a video of them.

    ``lengths`` are the true clips' numbers of frames. ValueError for a missing folder; a clip that is missing, or
    differs in number or size of its frames, is a SampleError when its turn comes.
    """
    clips = {clip.name: clip for clip in open_clips(root)}
    if len(lengths) == 1 and len(clips) == 1:
        clips = {only: clip for only, clip in zip(lengths, clips.values(), strict=True)}

    def restore(lq: Tensor, clip: str, window: Window) -> Tensor:
        return _result(root, clips, clip, lengths[clip]).read(window.start, window.stop)

    return Method(name, restore, f"{root.resolve()} {_newest(clips.values())}")


def _result(root: Path, clips: dict[str, FileClip], name: str, length: int) -> FileClip:
    clip = clips.get(Path(name).name) or clips.get(name.replace("/", "_"))
    if clip is None:
        raise SampleError(f"{root}", f"no results for the clip {name}; there are {', '.join(clips)}")
    if clip.is_video:
        clip.read(0, 1)  # counts its frames
    if clip.count != length:
        raise SampleError(str(clip.path), f"{clip.count} frames, but the true clip {name} has {length}")
    return clip


def _newest(clips: Any) -> str:
    """When the newest of the clips was written, and how many files there are."""
    files = [file for clip in clips for file in ([clip.path] if clip.is_video else sorted(clip.path.iterdir()))]
    return f"{max(file.stat().st_mtime_ns for file in files)} {len(files)}"


def names_of(results: Sequence[str]) -> dict[str, Path]:
    """``[NAME=]FOLDER`` arguments by name; ValueError for a name that comes twice or a folder that is not there."""
    named: dict[str, Path] = {}
    for text in results:
        name, equals, place = text.partition("=")
        path = Path(place if equals else name).expanduser()
        name = name if equals else path.name
        if not path.is_dir():
            raise ClipError(f"--results {text}: no such folder; give a folder with a folder or video for each clip")
        if name in named:
            raise ClipError(f"--results {text}: {name!r} comes twice; name them: --results NAME=FOLDER")
        named[name] = path
    return named
