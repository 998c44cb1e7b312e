"""A gate that learns which DCT coefficients count, after "Learning in the Frequency Domain" (Xu et al., CVPR 2020).

Per picture and channel: spatial mean -> 1x1 convolution, norm, ReLU -> two logits, off and on -> Gumbel-softmax, hard
in the forward pass, soft in the backward pass (straight-through) -> times 0 or 1. A regulariser switches off channels
that the task does not need. Structure and initial values follow the authors' code (DCTNet); departures, all ours:

- Evaluation takes the likelier of on and off. The published code draws noise there too, and results vary.
- The temperature falls from 5 to 0.5 over the training; it is 1 throughout in the published code. Only gradients feel
  it: a hard sample does not depend on it.
- The regulariser is the mean probability of being on. The paper sums the sampled gates: the same in expectation, with
  noise. Its weight is not published; start at 1e-3.
- GroupNorm over all channels by default. BatchNorm, as published, sees one value a picture: with batches of one or two
  clips its statistics are noise or an error. It also centres what enters the ReLU. Nothing else does, and a channel's
  logits see one unit alone, so the ReLU is leaky: with a plain one, 2 of 5 gates never learnt to look at their input
  (measured: toy task, GroupNorm, inputs of one sign), with a leaky one none of 5.

`CompressionCondition` is our use of it, and reproduces no published component.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, lrelu, zero
from archs.layers.dct_input import DCTInput, static_subset

FLOOR = 0.01  # of mean magnitudes, before the logarithm: 1/100 of what a normalised coefficient has

Norm = Literal["group", "batch", "none"]
Statistic = Literal["mean", "magnitude"]


class DCTGate(nn.Module):
    """Multiplies every channel of every picture by 0 or 1: drawn in training, decided in evaluation.

    ``statistic`` is what the gate sees of a channel: its "mean", as published, or the log of its mean "magnitude"
    (ours). The mean of a coefficient over a picture is near 0 for all but the lowest frequencies, however strong they
    are; the magnitude tells which of them the picture, or its compression, has left. (Measured on 49 frames of real
    video: JPEG of quality 50 moves the median channel's mean by 0.1 standard deviations, its magnitude by 2.3.)

    ``norm``: "group" (over all channels of a picture), "batch" (as published, for large batches) or "none".

    The temperature falls geometrically, ``temperatures[0]`` to ``[1]``, over ``anneal_steps`` forward passes in
    training mode. They are counted in the buffer ``steps``, so that nobody has to tell the gate where training stands
    and continued runs continue it. Every pass counts: each batch of an accumulated step, and once more where
    activations are computed again (gates are cheap: leave them out of `heavy_modules`).
    """

    def __init__(
        self,
        channels: int = 192,
        *,
        norm: Norm = "group",
        statistic: Statistic = "mean",
        temperatures: tuple[float, float] = (5.0, 0.5),
        anneal_steps: int = 10_000,
    ) -> None:
        super().__init__()
        if statistic not in ("mean", "magnitude"):
            raise ValueError(f"statistic={statistic!r} is neither 'mean' nor 'magnitude'")
        if min(temperatures) <= 0 or anneal_steps < 1:
            raise ValueError(f"temperatures={temperatures} and anneal_steps={anneal_steps} must be positive")
        self.statistic, self.temperatures, self.anneal_steps = statistic, temperatures, anneal_steps
        self.mix = conv1x1(channels, channels)
        self.norm = _norm(norm, channels)
        self.decide = nn.Conv2d(channels, 2 * channels, 1, groups=channels)  # channel c: 2c is off, 2c + 1 is on
        nn.init.kaiming_normal_(self.mix.weight, nonlinearity="relu")
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.decide.weight, std=1e-3)
        self.decide.bias = nn.Parameter(torch.tensor([0.1, 2.0]).repeat(channels))  # 87% on
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor
        self.on_rate: Float[Tensor, ""] | None = None  # of the last forward pass in training mode, 0..1

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same with channels switched off; no gate is ever between 0 and 1."""
        odds = self.log_odds(x)
        if not self.training:
            return x * (odds > 0).to(x.dtype)
        self.on_rate = odds.sigmoid().mean()
        return x * self._draw(odds).to(x.dtype)

    def log_odds(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """Log of P(on) / P(off), float32: evaluation switches on what is above 0."""
        if self.statistic == "magnitude":
            seen = (x.abs().mean((-2, -1), keepdim=True) + FLOOR).log()
        else:
            seen = x.mean((-2, -1), keepdim=True)
        hidden = lrelu(self.norm(self.mix(seen)))
        off, on = self.decide(hidden).float().unflatten(1, (-1, 2)).unbind(2)
        return on - off

    def temperature(self) -> Float[Tensor, ""]:
        """What the next forward pass in training divides by."""
        first, last = self.temperatures
        progress = (self.steps / self.anneal_steps).clamp(max=1)
        return first * (last / first) ** progress

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The mean probability of being on as ``dct_on_rate``; nothing before the first forward pass in training."""
        return {} if self.on_rate is None else {"dct_on_rate": self.on_rate}

    def _draw(self, odds: Float[Tensor, "b c 1 1"]) -> Float[Tensor, "b c 1 1"]:
        """0 or 1 by chance, with the gradient of the relaxed sample."""
        noise = torch.logit(torch.rand_like(odds), eps=1e-6)  # the difference of two Gumbel variables is logistic
        soft = ((odds + noise) / self.temperature()).sigmoid()
        self.steps.add_(1)
        return (odds + noise > 0).float() + (soft - soft.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_rate": None}  # part of a graph, which copies and pickles cannot hold


class CompressionCondition(nn.Module):
    """Modulates features by what compression has left of the frame: features * (1 + scale) + shift, both predicted.

    Frame -> `DCTInput` -> `DCTGate` -> a small trunk on the grid of 8x8 blocks -> scale and shift per channel, bilinear
    between the centres of blocks. The last convolution is zero: a fresh condition changes nothing. For 64 channels it
    has 58k parameters and takes about a third of the time of one 3x3 convolution of them (measured, CPU).

    It tells how much detail there is and of which frequency and direction, not where inside a block. Blocks start at
    the top left pixel, so the grid of a codec is met where crops and tiles start at multiples of 8. The gate decides
    for a whole picture: tiles of one frame may differ.

    ``coefficients`` is 192 or a published selection (`static_subset`), ``hidden`` the width of the trunk, the rest as
    in `DCTGate`.
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: int = 32,
        coefficients: int = 192,
        norm: Norm = "group",
        statistic: Statistic = "magnitude",
        anneal_steps: int = 10_000,
    ) -> None:
        super().__init__()
        self.transform = DCTInput()
        self.register_buffer("kept", torch.tensor(static_subset(coefficients)), persistent=False)
        self.kept: Tensor
        self.gate = DCTGate(coefficients, norm=norm, statistic=statistic, anneal_steps=anneal_steps)
        self.enter = conv1x1(coefficients, hidden)
        self.around = conv3x3(hidden, hidden)
        self.last = zero(conv1x1(hidden, 2 * channels))

    def forward(self, features: Float[Tensor, "b c h w"], frames: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Features of frames and these frames, RGB in [0, 1], of any size. A clip goes in as one batch.

        The frames are of the features' size, or 2, 4 or 8 times as large. Raises ValueError for anything else, and
        where the batches differ.
        """
        h, w = features.shape[-2:]
        factor = frames.shape[-1] // w
        if factor not in (1, 2, 4, 8) or frames.shape[::2] != (len(features), factor * h) or frames.shape[-1] % w:
            shapes = f"features {tuple(features.shape)} and frames {tuple(frames.shape)}"
            raise ValueError(f"{shapes} differ in batch or size")
        coefficients = self.gate(self.transform(frames).index_select(1, self.kept))
        blocks = self.last(lrelu(self.around(lrelu(self.enter(coefficients)))))  # (B, 2C, ceil(h/8), ceil(w/8))
        scale, shift = (_fine(part, h, w, 8 // factor).to(features.dtype) for part in blocks.chunk(2, 1))
        return features + features * scale + shift

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """As `DCTGate.auxiliary_losses`."""
        return self.gate.auxiliary_losses()


def _fine(
    blocks: Float[Tensor, "b c rows columns"], height: int, width: int, side: int
) -> Float[Tensor, "b c {height} {width}"]:
    """Bilinear from the centres of blocks to their pixels, cropped; two products are up to 30 times as fast on CPUs."""
    rows, columns = (
        F.interpolate(torch.eye(count, device=blocks.device)[None], scale_factor=side, mode="linear")[0, :, :length]
        for count, length in zip(blocks.shape[-2:], (height, width), strict=True)
    )
    return rows.T.to(blocks.dtype) @ blocks @ columns.to(blocks.dtype)


def _norm(name: Norm, channels: int) -> nn.Module:
    if name == "group":
        return nn.GroupNorm(1, channels)
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm={name!r} is none of 'group', 'batch', 'none'")
