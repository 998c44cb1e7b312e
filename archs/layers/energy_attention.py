"""Energy in the deformable attention: sharp sources count more, by place, by band and by channel.

`DeformableAttention` fetches from every source frame what answers a target's query and averages the answers with a
softmax over sources. `EnergyFusion` takes the place of that average, from coarse to fine:

- location: the logits get beta * log of the local high-frequency energy where the answer was read;
- band: gamma * (the answers fused by `EnergyWeightedFusion` - their mean) is added, with the coherence measured to the
  target's own values; the answers are aligned already, without which fusion by energy would be worse than a mean;
- channel: the result's channels are weighed by their spectra (`ChannelAttention`).

Each part starts silent, with one zero factor and never two: with gamma = 0 and p = 0 neither would get a gradient. Our
own construction after the idea of Zhu et al. (ICCV 2023; no code, no numbers public): it reproduces nothing.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.energy_fusion import Bands, ChannelAttention, Energy, EnergyWeightedFusion, Logit
from archs.layers.spectral import local_energy

FLAT = 1e-6  # local energy that counts as none


class FusedTarget(NamedTuple):
    """What an observer of `EnergyFusion` sees of one target frame; the tensors are the network's own: do not write."""

    target: int
    sources: tuple[int, ...]
    frame: Tensor  # (B, S, h, w), the softmax over sources
    band: Tensor | None  # (B, S, h, w//2+1), the weights of the bins of the half spectrum
    channel: Tensor | None  # (B, E), the factors


class EnergyFusion(nn.Module):
    """The answers of S sources, (B, S, E, h, w) -> what the target takes over, (B, E, h, w).

    ``location``, ``bands`` (None: off) and ``channel`` switch the three parts; the rest is `EnergyWeightedFusion`'s. A
    fresh one is the plain softmax over sources. ValueError where all are off: that is ``fusion=None``.

    ``observe``, None or a function, is called with a `FusedTarget` after each target frame.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        location: bool = True,
        bands: Bands | None = "polar",
        channel: bool = True,
        radial: int = 8,
        angular: int = 8,
        logit: Logit = "log",
        energy: Energy = "relative",
        p: float = 2.0,
        kappa: float = 1.0,
    ) -> None:
        super().__init__()
        if not (location or bands or channel):
            raise ValueError("EnergyFusion without location, bands and channel does nothing: leave it out")
        self.beta = nn.Parameter(torch.zeros(())) if location else None
        self.band: EnergyWeightedFusion | None = None
        if bands:
            self.band = EnergyWeightedFusion(
                radial=radial, angular=angular, bands=bands, logit=logit, energy=energy, p=p, kappa=kappa
            )
        self.gamma = nn.Parameter(torch.zeros(embed_dim)) if bands else None
        self.channel = ChannelAttention(embed_dim) if channel else None
        self.observe: Callable[[FusedTarget], None] | None = None

    def detail(self, values: Float[Tensor, "b t e h w"]) -> Float[Tensor, "b t 1 h w"] | None:
        """Local high-frequency energy, log(1 + E / 1e-6), so that 0, which is read beyond the border, is flat."""
        if self.beta is None:
            return None
        return local_energy(values.flatten(0, 1), floor=FLAT).unflatten(0, values.shape[:2]) - log(FLAT)

    def forward(
        self,
        fetched: Float[Tensor, "b s e h w"],
        relevance: Float[Tensor, "b s h w"],
        own: Float[Tensor, "b e h w"],
        detail: Float[Tensor, "b s h w"] | None = None,
        *,
        target: int = 0,
        sources: Sequence[int] = (),
    ) -> Float[Tensor, "b e h w"]:
        """Fuse: ``relevance`` are the logits, ``own`` the target's values, ``detail`` what was read of `detail`.

        ``target`` and ``sources``, the frames' indices, are for the observer. (The design's logits have the target's
        own energy subtracted; the same for all sources, it drops out of the softmax.)
        """
        if self.beta is not None:
            assert detail is not None, "the attention samples the detail map where this has one"
            relevance = relevance + self.beta * detail
        weight = relevance.softmax(1)
        y = (weight[:, :, None] * fetched).sum(1)
        band = factor = None
        if self.band is not None and self.gamma is not None:
            gain, band = self.band.gain(fetched, own)
            y = y + self.gamma[:, None, None] * gain
        if self.channel is not None:
            factor = self.channel.gain(y)
            y = y * factor[..., None, None].to(y.dtype)
        if self.observe is not None:
            self.observe(FusedTarget(target, tuple(sources), weight, band, factor))
        return y


def mean_weight_on(frames: Collection[int], observed: Iterable[FusedTarget]) -> float:
    """The share 0..1 that sources among ``frames`` have in what was fused, averaged over targets, clips and pixels.

    With the odd frames of a space-time network's sequence, which are the interpolated ones, it says how much the
    aggregation leans on them.
    """
    shares = []
    for seen in observed:
        chosen = [k for k, i in enumerate(seen.sources) if i in frames]
        shares.append(float(seen.frame[:, chosen].sum(1).mean()))
    if not shares:
        raise ValueError("no target was observed: set `observe` before the network runs")
    return sum(shares) / len(shares)
