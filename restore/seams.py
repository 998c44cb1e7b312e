"""What cutting a clip into windows and tiles changes of its restored frames, measured against none of it.

whole = uncut(net, clip)
seams(net, clip, whole=whole, tile=96, tile_overlap=16)         # Seams(largest=0.08, mean=0.0007)
seams(net, clip, whole=whole, window=4, temporal_overlap=1)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from archs import VideoNet
from restore.stream import restore_clip


@dataclass(frozen=True)
class Seams:
    """|difference| of restored values, which are in [0, 1]: the largest, and the mean of all frames."""

    largest: float
    mean: float


def uncut(net: VideoNet, clip: Float[Tensor, "t 3 h w"], precision: str = "fp32") -> Float[Tensor, "u 3 H W"]:
    """All frames of a clip restored at once and whole, in [0, 1]."""
    return torch.stack(list(_cut(net, clip, precision=precision)))


def seams(
    net: VideoNet, clip: Float[Tensor, "t 3 h w"], *, whole: Float[Tensor, "u 3 H W"] | None = None,
    precision: str = "fp32", **cut: Any,
) -> Seams:  # fmt: skip
    """How the restored clip differs from ``whole`` if it is cut.

    ``cut`` are ``window``, ``temporal_overlap``, ``tile`` and ``tile_overlap`` of `restore_clip`; without a window all
    frames are restored at once, without a tile whole ones. ``whole`` is what `uncut` gives, and computed if not given.
    ValueError as in `restore_clip`.
    """
    reference = uncut(net, clip, precision) if whole is None else whole
    frames = _cut(net, clip, precision=precision, **cut)
    differences = [(frame - true).abs() for frame, true in zip(frames, reference, strict=True)]
    return Seams(
        largest=max(float(difference.max()) for difference in differences),
        mean=sum(float(difference.mean()) for difference in differences) / len(differences),
    )


def _cut(net: VideoNet, clip: Tensor, *, precision: str, **cut: Any) -> Iterator[Tensor]:
    at_once: dict[str, Any] = {"window": len(clip), "temporal_overlap": min(1, len(clip) - 1)}
    return restore_clip(net, clip, precision=precision, **({} if "window" in cut else at_once), **cut)
