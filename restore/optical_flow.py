"""Dense optical flow between frames, and where it can be trusted.

A flow is (2, H, W) float32 in pixels, (dy, dx) as `archs.layers.deform.warp` takes it: what is at a pixel p of the
first frame is at p + flow of the second.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from archs.layers.deform import warp

GREY = "8-bit grey (0.299 R + 0.587 G + 0.114 B)"
VISIBILITY = "forward-backward and motion-boundary test of Sundaram et al. 2010, sources outside the frame left out"


def grey_levels(frames: Float[Tensor, "t 3 h w"]) -> UInt8[np.ndarray, "t h w"]:
    """8-bit luminance of RGB frames in [0, 1], as OpenCV rounds it."""
    levels = (frames.detach().cpu() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    grey = np.empty(levels.shape[:3], np.uint8)
    for plane, frame in zip(grey, levels, strict=True):
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY, dst=plane)
    return grey


@dataclass(frozen=True, kw_only=True)
class Farneback:
    """Flow by polynomial expansion (Farneback, SCIA 2003), as OpenCV has it; runs on the CPU.

    The defaults are those of TecoGAN's evaluation program: 3 levels of factor 0.5, windows of 15 pixels, 3 iterations,
    polynomials over 5 pixels with sigma 1.2.
    """

    levels: int = 3
    winsize: int = 15

    def __post_init__(self) -> None:
        for key, low in (("levels", 1), ("winsize", 3)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")

    def describe(self) -> str:
        """Every parameter."""
        return (
            f"Farneback flow (pyramid of {self.levels} levels, factor 0.5, window {self.winsize}, 3 iterations, "
            f"polynomials over 5, sigma 1.2) of {GREY}"
        )

    def __call__(self, first: UInt8[np.ndarray, "h w"], second: UInt8[np.ndarray, "h w"]) -> Float32[Tensor, "2 h w"]:
        """The flow from the first frame to the second."""
        start = np.zeros((*first.shape, 2), np.float32)
        xy = cv2.calcOpticalFlowFarneback(first, second, start, 0.5, self.levels, self.winsize, 3, 5, 1.2, 0)
        return torch.from_numpy(np.ascontiguousarray(xy[..., ::-1].transpose(2, 0, 1)))


def visible(backward: Float[Tensor, "2 h w"], forward: Float[Tensor, "2 h w"]) -> Bool[Tensor, "h w"]:
    """Pixels of a frame that the other frame shows too, from the flow to that frame and the flow back.

    The test of Sundaram, Brox and Keutzer, "Dense point trajectories", ECCV 2010, with the constants that Ruder et al.
    2016 and Lai et al. 2018 use: with u the backward flow and v the forward flow read where u points, a pixel is
    occluded if |u + v|^2 > 0.01 (|u|^2 + |v|^2) + 0.5, and at a motion boundary if |grad u|^2 > 0.01 |u|^2 + 0.002.
    Pixels that u sends out of the frame are invisible, too (ours: `warp` would repeat the edge there).
    """
    returned = warp(forward[None], backward[None])[0]
    length = backward.square().sum(0)
    occluded = (backward + returned).square().sum(0) > 0.01 * (length + returned.square().sum(0)) + 0.5
    below = backward.diff(dim=1, append=backward[:, -1:])
    right = backward.diff(dim=2, append=backward[:, :, -1:])
    boundary = (below.square() + right.square()).sum(0) > 0.01 * length + 0.002
    height, width = length.shape
    y = torch.arange(height, device=backward.device)[:, None] + backward[0]
    x = torch.arange(width, device=backward.device) + backward[1]
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    return inside & ~occluded & ~boundary
