"""Sheets of pictures for people: frames next to each other and below each other, each under its name.

A picture is float RGB, (3, h, w), in [0, 1]. Text is drawn by OpenCV, which knows ASCII only.
"""

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

DARK, LIGHT, GREY = (24, 24, 24), (235, 235, 235), (130, 130, 130)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def side_by_side(parts: Mapping[str, Float[Tensor, "3 h w"]]) -> Float[Tensor, "3 row_h row_w"]:
    """Frames of one size next to each other, each under its name."""
    return torch.cat([captioned(frame, name) for name, frame in parts.items()], dim=2)


def captioned(frame: Float[Tensor, "3 h w"], text: str, bar: int = 24) -> Float[Tensor, "3 bar_h w"]:
    """The frame under a dark bar of ``bar`` px with its name, whose beginning is cut off where it is too long.

    Two columns of the bar's colour keep neighbours apart.
    """
    height, width = frame.shape[1:]
    size = bar / 48

    def draw(canvas: np.ndarray) -> None:
        canvas[bar:] = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        canvas[:, -2:] = DARK
        write(canvas, _end_of(text, width - 10, size), (bar // 3, bar * 17 // 24), size)

    return drawn(height + bar, width, draw)


def stacked(rows: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, "3 sheet_h sheet_w"]:
    """Pictures of any size below each other, dark to the right of the narrower ones."""
    width = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[2]), value=DARK[0] / 255) for row in rows], dim=1)


def paragraph(text: str, width: int, size: float = 0.5) -> Float[Tensor, "3 h {width}"]:
    """Text on a dark ground, in lines of ``width`` px."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and _width(longer, size) > width - 16:
            lines.append(word)
        else:
            lines[-1] = longer
    step = round(40 * size)

    def draw(canvas: np.ndarray) -> None:
        for n, line in enumerate(lines):
            write(canvas, line, (8, step * (n + 1) - step // 5), size)

    return drawn(step * len(lines) + 8, width, draw)


def fitted(frame: Float[Tensor, "3 h w"], side: int) -> Float[Tensor, "3 _ _"]:
    """The frame within ``side`` x ``side`` px: a small one enlarged by a whole factor, a large one averaged."""
    longer = max(frame.shape[1:])
    if longer <= side:
        return frame.repeat_interleave(side // longer, 1).repeat_interleave(side // longer, 2)
    size = [max(round(n * side / longer), 1) for n in frame.shape[1:]]
    return F.interpolate(frame[None], size, mode="area")[0]


def drawn(height: int, width: int, draw: Callable[[np.ndarray], None]) -> Float[Tensor, "3 {height} {width}"]:
    """A dark picture on which ``draw`` has drawn: it is given 8-bit RGB, (height, width, 3)."""
    canvas = np.full((height, width, 3), DARK, dtype=np.uint8)
    draw(canvas)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255


def write(
    canvas: np.ndarray,
    text: str,
    at: tuple[int, int],
    size: float = 0.5,
    colour: tuple[int, int, int] = LIGHT,
    *,
    to_left: bool = False,
) -> None:
    """Text on 8-bit RGB, ``at`` (x, y) of its lower left corner, or ``to_left`` of there; 0.5 is about 12 px high."""
    plain = text.encode("ascii", "replace").decode()
    x = at[0] - _width(plain, size) if to_left else at[0]
    cv2.putText(canvas, plain, (x, at[1]), FONT, size, colour, 1, cv2.LINE_AA)


def _end_of(text: str, width: int, size: float) -> str:
    """The text or, where it is wider than ``width`` px, as much of its end as fits: frames differ at the end."""
    shown = text
    while _width(shown, size) > width and len(text) > 1:
        text = text[1:]
        shown = ".." + text
    return shown


def _width(text: str, size: float) -> int:
    """Of a line, px."""
    return cv2.getTextSize(text, FONT, size, 1)[0][0]
