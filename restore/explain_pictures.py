"""Pictures of what a network saw, for people: each is a sheet with its own words, names of frames, units and ranges."""

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from archs.layers.energy_attention import FusedTarget
from archs.layers.motion_prior import LUMA
from archs.layers.spectral import HIGHEST, local_energy
from restore.explain_drawing import (
    BLUE,
    ORANGE,
    RGB,
    Axis,
    bar_chart,
    flow_colours,
    flow_legend,
    full_length,
    heat,
    line_chart,
    scale_bar,
    spectrum_picture,
)
from restore.explain_watch import Seen, radial_energies
from restore.sheets import DARK, GREY, fitted, paragraph, side_by_side, stacked

DECIBEL = 10 / log(10)  # of a natural logarithm of energies
WIDEST = 1500  # px, of a row of panels


class Picture(NamedTuple):
    """A sheet and what it shows in a sentence or two."""

    name: str  # of the file, without suffix
    words: str
    sheet: Float[Tensor, "3 h w"]


class Frames(NamedTuple):
    """The frames of a sequence as panels show them."""

    names: list[str]  # of the U frames, inputs and those in between
    step: int  # every step-th is an input
    pictures: Float[Tensor, "u 3 h w"]

    @property
    def inputs(self) -> list[str]:
        """Names of the frames that went in."""
        return self.names[:: self.step]

    def gap(self, n: int) -> str:
        """The pair of inputs around a gap."""
        return f"{self.inputs[n]} to {self.inputs[n + 1]}"

    def colour(self, i: int) -> RGB:
        """Blue for inputs, orange for frames in between."""
        return ORANGE if i % self.step else BLUE


def pictures(seen: Seen, names: Sequence[str]) -> list[Picture]:
    """All pictures there are of ``seen``, whose U frames have ``names``; parts that the network lacks have none."""
    assert seen.restored is not None, "a network ran while it was watched"
    frames = Frames(list(names), seen.step, seen.restored.clamp(0, 1))
    made = [make(seen, frames) for make in _PICTURES]
    return [picture for picture in made if picture is not None]


def decibels(energies: Tensor) -> Tensor:
    """10 log10 of energies, at least -120."""
    return DECIBEL * energies.clamp_min(1e-12).log()


# ---- the input


def _sharpness(seen: Seen, frames: Frames) -> Picture:
    assert seen.clip is not None
    maps = DECIBEL * local_energy(_luma(seen.clip))[:, 0]
    low, high = float(maps.min()), float(maps.max())
    side = _side(len(maps))
    shown = {name: fitted(frame, side) for name, frame in zip(frames.inputs, seen.clip, strict=True)}
    seen_as = {
        f"{name}: {float(values.mean()):.1f} dB": fitted(heat(values, low, high), side)
        for name, values in zip(frames.inputs, maps, strict=True)
    }
    return _picture(
        "sharpness",
        "Local sharpness of the input frames: energy of their brightness above 0.125 cycles/px in windows of 8 px, in "
        "dB, its mean above; 0 dB would be noise as strong as black against white. Bright is detail, dark is flat or "
        f"blurred: {low:.1f} to {high:.1f} dB.",
        [side_by_side(shown), side_by_side(seen_as), scale_bar(low, high, "dB")],
    )


def _input_energies(seen: Seen, frames: Frames) -> Picture:
    assert seen.clip is not None
    return _energies(
        "energies_input",
        "Energy of the input frames by frequency (brightness, 8 radial bands, Hann window): left all frames in dB, "
        "then each frame against their mean. Above the grey line: sharper than the others, below: softer.",
        radial_energies(_luma(seen.clip))[:, 0],
        frames.inputs,
        [BLUE] * len(seen.clip),
    )


# ---- motion


def _matching(seen: Seen, frames: Frames) -> Picture | None:
    if seen.matched is None:
        return None
    words = (
        "Motion from each frame to the next, estimated by block matching, as seen from the instant between them, its "
        "mean length above: where the alignment starts."
    )
    return _motion("motion_matching", words, seen, frames, seen.matched, None)


def _phase_correlation(seen: Seen, frames: Frames) -> Picture | None:
    if seen.shifts is None:
        return None
    words = (
        "Motion from each frame to the next by phase correlation of the features, its mean length above, and how sure "
        "it is (0 to 1)."
    )
    if seen.matched is not None:
        words += " The frames were moved by the block matching first: this is the motion that remained."
    return _motion("motion_phase", words, seen, frames, seen.shifts, seen.confidence)


def _motion(name: str, words: str, seen: Seen, frames: Frames, field: Tensor, confidence: Tensor | None) -> Picture:
    assert seen.clip is not None
    full, longest = full_length([field])
    side = _side(4 if confidence is None else 5)
    rows = []
    for n, vectors in enumerate(field):
        cells = {
            frames.inputs[n]: seen.clip[n],
            frames.inputs[n + 1]: seen.clip[n + 1],
            f"{frames.gap(n)}: {_length(vectors)}": flow_colours(vectors, full),
        }
        if confidence is not None:
            cells[f"confidence: {float(confidence[n].mean()):.2f}"] = heat(confidence[n, 0], 0, 1)
        rows.append(side_by_side({key: fitted(cell, side) for key, cell in cells.items()}))
    legend = [flow_legend("the content moves that way", full, longest)]
    if confidence is not None:
        legend.append(scale_bar(0, 1, "confidence"))
    return _picture(name, words, [*rows, *legend])


# ---- where the network reads


def _alignment(seen: Seen, frames: Frames) -> Picture | None:
    if not seen.aligned:
        return None
    full, longest = full_length(list(seen.aligned.values()))
    side = _side(3)
    rows = []
    for n in range(len(frames.inputs) - 1):
        middle = n * frames.step + 1
        cells = {frames.names[middle]: frames.pictures[middle]}
        for which, field in seen.aligned.items():
            source = frames.inputs[n + (which == "later")]
            cells[f"in {source}: {_length(field[n])}"] = flow_colours(field[n], full)
        rows.append(side_by_side({key: fitted(cell, side) for key, cell in cells.items()}))
    return _picture(
        "offsets_alignment",
        "Alignment: where the features of a frame in between (left, as restored) are read in the frame before and in "
        "the frame after it, relative to each pixel; the mean over the deformable taps of the finest level, its mean "
        "length above. Opposite colours: the network follows a motion through the frame in between.",
        [*rows, flow_legend("what is read lies that way", full, longest)],
    )


def _aggregation(seen: Seen, frames: Frames) -> Picture | None:
    if not seen.read:
        return None
    full, longest = full_length(seen.read)

    def cell(row: int, k: int) -> tuple[str, Tensor]:
        vectors = seen.read[row][k]
        return _length(vectors), flow_colours(vectors, full)

    return _picture(
        "offsets_aggregation",
        "Aggregation: where each frame (left, as restored) reads the others, relative to each pixel; the mean over the "
        "deformable taps, its mean length above. Where the network follows motion, frames further away in time are "
        "read further away in space.",
        [*_rows_of_sources(seen, frames, cell), flow_legend("what is read lies that way", full, longest)],
    )


# ---- what the sources count


def _weights(seen: Seen, frames: Frames) -> Picture | None:
    if not seen.fused:
        return None
    high = min(2 / max(len(target.sources) for target in seen.fused), 1.0)

    def cell(row: int, k: int) -> tuple[str, Tensor]:
        weight = seen.fused[row].frame[0, k]
        return f"{float(weight.mean()):.2f}", heat(weight, 0, high)

    def bars(row: int, size: tuple[int, int]) -> tuple[str, Tensor]:
        target = seen.fused[row]
        means = target.frame[0].mean((-2, -1)).tolist()
        return "means", bar_chart(means, [frames.colour(i) for i in target.sources], high, size[1], size[0])

    words = (
        "Fusion: what each source counts in each frame (left, as restored), pixel by pixel, and its mean; the weights "
        "of a row sum to 1. The brightest colour and the highest bar are twice an equal share, or more. Bars are the "
        "means, blue for input frames and orange for interpolated ones; the grey line is an equal share."
    )
    leaning = seen.leaning()
    if leaning is not None:
        words += f" {leaning.capitalize()}."
    return _picture("weights", words, [*_rows_of_sources(seen, frames, cell, bars), scale_bar(0, high, "weight")])


def _band_weights(seen: Seen, frames: Frames) -> Picture | None:
    # a single source has all the weight: nothing to see
    weighed = [n for n, target in enumerate(seen.fused) if target.band is not None and len(target.sources) > 1]
    planes = {n: _relative_planes(seen.fused[n], seen.padded[1]) for n in weighed}
    if not planes:
        return None
    low, high = min(float(x.min()) for x in planes.values()), max(float(x.max()) for x in planes.values())

    def cell(row: int, k: int) -> tuple[str, Tensor]:
        return f"{float(planes[row][k].mean()):.2f}", heat(planes[row][k], low, high)

    return _picture(
        "weights_bands",
        "Fusion by band: what each source counts in each frame (left, as restored) at every frequency, and its mean; 1 "
        "is an equal share of all sources. A panel is the plane of frequencies: slow changes in its centre, the finest "
        "detail (0.5 cycles/px) at its edges; vertical edges and stripes lie on its horizontal axis, horizontal ones "
        "on the vertical axis. Bright: more of that detail is taken from this source. "
        f"{low:.3f} to {high:.3f}.",
        [*_rows_of_sources(seen, frames, cell, rows=weighed, square=True), scale_bar(low, high, "equal shares")],
    )


def _relative_planes(target: FusedTarget, width: int) -> Float[Tensor, "s h w"]:
    """A target's weights of its sources over the plane of frequencies, in units of equal ones."""
    assert target.band is not None
    return torch.stack([spectrum_picture(weights, width) for weights in target.band[0]]) * len(target.sources)


def _feature_energies(seen: Seen, frames: Frames) -> Picture | None:
    if seen.feature_energies is None:
        return None
    return _energies(
        "energies_features",
        "Energy of the features that the frames exchange, by frequency (mean over channels, 8 radial bands, Hann "
        "window): left all frames in dB, then each against the mean of all. Blue: input frames, orange: interpolated "
        "ones, which are softer where their line falls to the right.",
        seen.feature_energies,
        frames.names,
        [frames.colour(i) for i in range(len(frames.names))],
    )


_PICTURES: tuple[Callable[[Seen, Frames], Picture | None], ...] = (
    *(_matching, _phase_correlation, _alignment, _aggregation, _weights, _band_weights),
    *(_input_energies, _feature_energies, _sharpness),
)


# ---- parts of sheets


def _picture(name: str, words: str, rows: Sequence[Tensor]) -> Picture:
    width = max(max(row.shape[2] for row in rows), 720)
    return Picture(name, words, stacked([paragraph(words, width), *rows]))


def _rows_of_sources(
    seen: Seen,
    frames: Frames,
    cell: Callable[[int, int], tuple[str, Tensor]],
    last: Callable[[int, tuple[int, int]], tuple[str, Tensor]] | None = None,
    *,
    rows: Sequence[int] | None = None,
    square: bool = False,
) -> list[Tensor]:
    """A row for each target (of ``rows``): the restored frame, a cell for each of its sources, maybe a ``last`` one.

    ``cell`` gives a few words and a picture of the source k of a row; ``square`` ones stand beside frames of any shape.
    """
    most = max(len(target.sources) for target in seen.fused)
    side = min(_side(1 + most + (last is not None)), 160 if square else WIDEST)
    made = []
    for row in range(len(seen.fused)) if rows is None else rows:
        target = seen.fused[row]
        frame = fitted(frames.pictures[target.target], side)
        if square:
            frame = F.pad(frame, (0, 0, 0, max(side - frame.shape[1], 0)), value=DARK[0] / 255)
        cells = {frames.names[target.target]: frame}
        for k, i in enumerate(target.sources):
            text, picture = cell(row, k)
            size = (side, side) if square else (frame.shape[1], frame.shape[2])
            cells[f"{frames.names[i]}: {text}"] = F.interpolate(picture[None], size, mode="area")[0]
        if last is not None:
            text, picture = last(row, (frame.shape[1], frame.shape[2]))
            cells[text] = picture
        made.append(side_by_side(cells))
    return made


def _energies(name: str, words: str, energies: Tensor, names: list[str], colours: list[RGB]) -> Picture:
    levels = decibels(energies)
    against = levels - levels.mean(0)
    reach = max(float(against.abs().max()), 0.1)
    x = Axis(0, HIGHEST, "cycles/px")
    low, high = float(levels.min()), float(levels.max())
    everything = line_chart(list(zip(levels, colours, strict=True)), x, Axis(low, max(high, low + 0.1), "dB"))
    charts = {"all frames": everything}
    for frame, colour, line in zip(names, colours, against, strict=True):
        grey = (torch.zeros_like(line), GREY)
        charts[frame] = line_chart([grey, (line, colour)], x, Axis(-reach, reach, "dB against the mean"))
    cells = list(charts.items())
    per_row = max(WIDEST // everything.shape[2], 1)
    return _picture(name, words, [side_by_side(dict(cells[n : n + per_row])) for n in range(0, len(cells), per_row)])


def _length(vectors: Float[Tensor, "2 h w"]) -> str:
    return f"{float(vectors.norm(dim=0).mean()):.2f} px"


def _luma(clip: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "t 1 h w"]:
    return (clip * clip.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _side(columns: int) -> int:
    return min(max(WIDEST // columns, 120), 320)
