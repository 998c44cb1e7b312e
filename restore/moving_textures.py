"""Made clips whose class is how a texture moves: nothing to download, and nothing that a single frame tells.

A window goes over a texture at constant speed. The texture is made of the details of a photograph (`restore.sample`)
and mirrored into a torus, transposed or not, with its colours in any order; the window begins anywhere on it. So every
frame of every class has the same distribution, whatever its place in the clip, and the frames of a clip run backwards
are a clip of the opposite direction: only their order tells which it is.

With ``hold`` 4 every frame is shown four times, so that the first layer of DTF, which takes four frames for one, sees
nothing move: only what its filters over time make of the groups can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from restore.clip_sources import to_bytes
from restore.labelled_clips import Labelled, LabelledClip
from restore.sample import PHOTOGRAPHS, photograph

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # of the texture: rows, columns


def moving_textures(
    directions: Sequence[str], speeds: Sequence[int], *, hold: int, photos: Sequence[str], number: int, length: int,
    side: int, seed: int,
) -> Labelled:  # fmt: skip
    """``number`` clips, all classes (direction and speed) in turn; the same arguments give the same clips.

    ValueError for what names no direction or photograph, and for numbers below 1.
    """
    for what, given, known in (("directions", directions, DIRECTIONS), ("photos", photos, PHOTOGRAPHS)):
        if not given or not set(given) <= set(known) or len(set(given)) < len(given):
            raise ValueError(f"{what}={list(given)}: give some of {', '.join(known)}, each once")
    if not speeds or len(set(speeds)) < len(speeds) or min(*speeds, hold, number, length, side) < 1:
        raise ValueError(f"speeds={list(speeds)} must differ; they, hold, number, length and side must be at least 1")
    classes = [(direction, speed) for direction in directions for speed in speeds]
    clips = []
    for i in range(number):
        (direction, speed), photo = classes[i % len(classes)], photos[i // len(classes) % len(photos)]
        step = (DIRECTIONS[direction][0] * speed, DIRECTIONS[direction][1] * speed)
        clip = MovingTexture(f"{direction}{speed}_{i:05d}", photo, (seed, i), step, length, (side, side), hold)
        clips.append(LabelledClip(clip.name, i % len(classes), clip))
    return Labelled(clips, tuple(f"{direction} {speed}" for direction, speed in classes))


@dataclass(frozen=True)
class MovingTexture:
    """A clip, rendered when it is asked for; each frame is shown ``hold`` times, ``step`` pixels from the next."""

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
