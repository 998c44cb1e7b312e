"""How numbers become pictures: vectors as colours of a wheel, maps as a colour scale, spectra as lines, shares as bars.

A picture is float RGB, (3, h, w), in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from restore.sheets import DARK, GREY, captioned, drawn, paragraph, write

BLUE, ORANGE = (86, 156, 255), (255, 159, 64)  # frames at input times, frames in between

RGB = tuple[int, int, int]


def flow_colours(vectors: Float[Tensor, "2 h w"], full: float) -> Float[Tensor, "3 h w"]:
    """Vectors (dy, dx) as hue = direction and saturation = length / ``full``, at most 1; (0, 0) is white.

    Right is red, down is yellow-green, left is cyan, up is violet.
    """
    dy, dx = vectors
    turn = torch.atan2(dy, dx).remainder(2 * pi) / (2 * pi)
    sectors = (6 * turn + torch.tensor([0.0, 4.0, 2.0])[:, None, None]).remainder(6)  # of red, green and blue
    hue = ((sectors - 3).abs() - 1).clamp(0, 1)
    return 1 - (vectors.norm(dim=0) / full).clamp(max=1) * (1 - hue)


def wheel(side: int) -> Float[Tensor, "3 {side} {side}"]:
    """The legend of `flow_colours`: a disc in which each place has the colour of the vector from the centre to it."""
    steps = (torch.arange(side) + 0.5) * (2 / side) - 1
    vectors = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))
    return torch.where(vectors.norm(dim=0) <= 1, flow_colours(vectors, 1.0), DARK[0] / 255)


def flow_legend(meaning: str, full: float, longest: float) -> Float[Tensor, "3 h w"]:
    """The wheel beside what a vector means, the length of the full colour and the greatest length, px."""
    text = paragraph(
        f"Colour is direction, seen from the centre of the wheel: {meaning}. White is 0 px, full colour {full:.2f} px "
        f"or more; the longest vector here has {longest:.2f} px.",
        600,
    )
    disc = captioned(wheel(72), "", 8)
    return torch.cat([disc, F.pad(text, (0, 0, 0, disc.shape[1] - text.shape[1]), value=DARK[0] / 255)], dim=2)


def full_length(fields: Sequence[Float[Tensor, "_ 2 _ _"]]) -> tuple[float, float]:
    """The length that gets the full colour, exceeded by 1% of the vectors, and the greatest one; px.

    The former is at least 0.1 px, so that fields of almost nothing look like that.
    """
    lengths = torch.cat([x.norm(dim=1).flatten() for x in fields]).numpy()
    return max(float(np.percentile(lengths, 99)), 0.1), float(lengths.max())


def heat(values: Float[Tensor, "h w"], low: float, high: float) -> Float[Tensor, "3 h w"]:
    """A map as colours from dark (``low``) to yellow (``high``), perceptually uniform (viridis)."""
    level = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte().numpy()
    colours = cv2.applyColorMap(np.ascontiguousarray(level), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(colours.transpose(2, 0, 1))).float() / 255


def scale_bar(low: float, high: float, unit: str) -> Float[Tensor, "3 h w"]:
    """The legend of `heat`."""

    def draw(canvas: np.ndarray) -> None:
        ramp = heat(torch.linspace(0, 1, 240).expand(14, -1), 0, 1)
        canvas[8:22, 60:300] = (ramp * 255).byte().permute(1, 2, 0).numpy()
        write(canvas, f"{low:.3g}", (8, 20), 0.45)
        write(canvas, f"{high:.3g} {unit}", (308, 20), 0.45)

    return drawn(30, 720, draw)


def spectrum_picture(weights: Float[Tensor, "h wf"], width: int) -> Float[Tensor, "h w"]:
    """A map over the half spectrum of pictures of ``width`` px as one over the whole, with the mean in its centre."""
    h = weights.shape[0]
    columns = torch.arange(width)
    mirrored = columns > width // 2
    whole = weights[:, torch.where(mirrored, width - columns, columns)]
    turned = whole[-torch.arange(h) % h]  # x(-f) = x(f)
    return torch.fft.fftshift(torch.where(mirrored, turned, whole))


@dataclass(frozen=True)
class Axis:
    """What a chart spans: numbers ``low`` to ``high`` of ``unit``."""

    low: float
    high: float
    unit: str


def line_chart(
    lines: Sequence[tuple[Float[Tensor, " k"], RGB]], x: Axis, y: Axis, width: int = 230, height: int = 150
) -> Float[Tensor, "3 {height} {width}"]:
    """Lines over k evenly spaced places from one end of ``x`` to the other, the first one drawn first."""
    left, right, top, bottom = 38, width - 10, 20, height - 22

    def place(n: int, count: int, value: float) -> tuple[int, int]:
        share = min(max((value - y.low) / (y.high - y.low), 0), 1)
        return round(left + n / max(count - 1, 1) * (right - left)), round(bottom - share * (bottom - top))

    def draw(canvas: np.ndarray) -> None:
        for value in (y.low, (y.low + y.high) / 2, y.high):
            _, row = place(0, 2, value)
            cv2.line(canvas, (left, row), (right, row), (70, 70, 70), 1)
            write(canvas, f"{value:.3g}", (left - 4, row + 4), 0.4, to_left=True)
        write(canvas, y.unit, (left, 12), 0.4, GREY)
        write(canvas, f"{x.low:.3g}", (left, height - 6), 0.4)
        write(canvas, f"{x.high:.2f} {x.unit}", (right, height - 6), 0.4, to_left=True)
        for values, colour in lines:
            points = [place(n, len(values), float(value)) for n, value in enumerate(values)]
            cv2.polylines(canvas, [np.array(points, np.int32)], False, colour, 1, cv2.LINE_AA)

    return drawn(height, width, draw)


def bar_chart(
    values: Sequence[float], colours: Sequence[RGB], high: float, width: int, height: int
) -> Float[Tensor, "3 {height} {width}"]:
    """Shares as bars from 0 to ``high``, each under its number, and a line where equal ones would end."""

    def draw(canvas: np.ndarray) -> None:
        bottom, room = height - 6, height - 26
        step = (width - 12) / len(values)
        for n, (value, colour) in enumerate(zip(values, colours, strict=True)):
            left = round(8 + n * step)
            top = round(bottom - min(value / high, 1) * room)
            cv2.rectangle(canvas, (left, top), (left + max(round(step * 0.6), 2), bottom), colour, -1)
            write(canvas, f"{value:.2f}".removeprefix("0"), (left, top - 4), 0.4)
        even = round(bottom - min(1 / len(values) / high, 1) * room)
        cv2.line(canvas, (4, even), (width - 4, even), GREY, 1)

    return drawn(height, width, draw)
