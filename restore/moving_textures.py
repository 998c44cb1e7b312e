"""Made clips whose class is how a texture moves: nothing to download, and nothing that a single frame tells.

A window goes over a texture at constant speed. The texture is a photograph (`restore.sample`) mirrored into a torus,
turned, with colours exchanged and contrast changed at random; the window begins anywhere on it. So every frame of every
class has the same distribution, whatever its place in the clip, and the frames of a clip run backwards are those of a
clip of the opposite direction: only their order tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from restore.clip_sources import to_bytes
from restore.sample import photograph

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # of the texture: rows, columns
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class MovingTexture:
    """A clip that is rendered when it is asked for; every frame is shown ``hold`` times, `step` pixels from the next."""

    name: str
    photo: str
    seed: tuple[int, int]  # of its look and its beginning
    step: tuple[int, int]  # pixels, down and to the right, from a frame to the next different one
    count: int
    size: tuple[int, int]
    hold: int = 1

    def truth(self, frames: Sequence[int]) -> Sequence[UInt8[Tensor, "3 h w"]]:
        """The frames of these numbers."""
        rng = np.random.default_rng(self.seed)
        texture = _torus(self.photo)
        texture = texture.transpose(1, 2) if rng.random() < 0.5 else texture
        place = [int(rng.integers(extent)) for extent in texture.shape[1:]]
        seen = torch.stack([self._window(texture, place, number // self.hold) for number in frames])
        return list(to_bytes(_varied(seen, rng)))

    def _window(self, texture: Tensor, place: Sequence[int], time: int) -> Float[Tensor, "3 h w"]:
        """What is seen at a time: the window goes against the texture."""
        rows, columns = (
            (torch.arange(extent) + start - step * time) % whole
            for extent, start, step, whole in zip(self.size, place, self.step, texture.shape[1:], strict=True)
        )
        return texture[:, rows[:, None], columns]

    def inputs(self, frames: Sequence[int]) -> None:
        """There is no other resolution."""


@cache
def _torus(name: str) -> Float[Tensor, "3 512 512"]:
    """A photograph's details of 4 to 32 pixels, of equal contrast, beside their mirror images: no borders anywhere."""
    photo = photograph(name)[None]
    coarse, fine = (_resized(_resized(photo, side), 256) for side in (16, 128))
    detail = (fine - coarse)[0]
    detail = (0.5 + 0.2 * detail / detail.std()).clamp(0, 1)
    rows = torch.cat([detail, detail.flip(1)], 1)
    return torch.cat([rows, rows.flip(2)], 2)


def _resized(image: Float[Tensor, "1 3 _ _"], side: int) -> Float[Tensor, "1 3 {side} {side}"]:
    return F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)


def _varied(frames: Float[Tensor, "t 3 h w"], rng: np.random.Generator) -> Float[Tensor, "t 3 h w"]:
    """Colours in another order."""
    return frames[:, torch.from_numpy(rng.permutation(3))]
