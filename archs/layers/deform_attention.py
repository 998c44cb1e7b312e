"""STDFA: spatial-temporal deformable feature aggregation (STDAN, Wang et al., 2022).

Every frame asks every other frame: at each pixel nine deformable taps of the other frame are compared with the
query, the best `top_k` of them form its answer, and a softmax over frames weighs the answers.

Exact savings over the published program (same numbers to rounding): offsets and modulation are computed once a pair
for keys and values; the pair's first convolution is split into a query and a key half, computed once a frame; the
frame weight is formed from the chosen relevances; values are sampled at the chosen taps only.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.blocks import conv3x3, convolve3x3, lrelu, stack_frames
from archs.layers.deform import DeformOffsets, OffsetGuidance, deform_attend, deform_sum, guided, warp
from archs.layers.deform_torch import pick
from archs.layers.energy_attention import EnergyFusion
from archs.layers.frequency_align import ClipSpectra, SpectrumGuidance
from archs.layers.motion_prior import FrameMotion


class DeformableAttention(nn.Module):
    """Aggregate over time: (B, T, C, h, w) -> (B, T, C, h, w), the residual included.

    ``radius`` limits the sources of a frame to its nearest neighbours in time (None: all other frames, as published).
    ``fusion`` weighs the answers by their spectral energy as well (None: by the softmax alone, as published), and
    ``guidance``, of one level for ``embed_dim`` channels, tells the offsets what the spectra of a pair know.
    """

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        groups: int,
        *,
        top_k: int = 2,
        radius: int | None = None,
        fusion: EnergyFusion | None = None,
        guidance: SpectrumGuidance | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % groups:
            raise ValueError(f"embed_dim={embed_dim} does not divide by deform_groups={groups}")
        if not 1 <= top_k <= 9:
            raise ValueError(f"top_k={top_k} is not within 1..9, the taps of a 3x3 grid")
        self.top_k, self.radius, self.groups = top_k, radius, groups
        self.embed = conv3x3(channels, embed_dim)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.pair = conv3x3(2 * embed_dim, embed_dim)
        self.refine = conv3x3(embed_dim, embed_dim)
        self.offsets = DeformOffsets(embed_dim, groups)
        self.project = conv3x3(embed_dim, channels)
        self.fusion, self.guidance = fusion, guidance

    def forward(
        self, features: Float[Tensor, "b t c h w"], motion: FrameMotion | None = None
    ) -> Float[Tensor, "b t c h w"]:
        """Each frame plus what it gathers from the others; ``motion``, if known, is where sampling starts."""
        b, t = features.shape[:2]
        embedded = self.embed(features.flatten(0, 1)).permute(0, 2, 3, 1)
        query, key, value = (
            linear(embedded).permute(0, 3, 1, 2).unflatten(0, (b, t)) for linear in (self.query, self.key, self.value)
        )
        halves = self._pair_halves(query, key)
        detail = None if self.fusion is None else self.fusion.detail(value)
        spectra = None if self.guidance is None else self.guidance.spectra([key])
        # one tensor a frame: slicing would make the backward pass add up T tensors of all frames
        queries, keys, values, query_halves, key_halves = (x.unbind(1) for x in (query, key, value, *halves))
        gathered = []
        for j in range(t):
            sources = [i for i in range(t) if i != j and (self.radius is None or abs(i - j) <= self.radius)]
            if not sources:
                gathered.append(torch.zeros_like(queries[j]))
                continue
            flow = None if motion is None else motion.between(j, sources)
            key_j, value_j, seen = (stack_frames([x[i] for i in sources]) for x in (keys, values, key_halves))
            pair = query_halves[j][:, None] + (seen if flow is None else _warp_each(seen, flow))
            detail_j = None if detail is None else detail[:, sources]
            known = None if spectra is None else self._guidance(spectra, key_j, flow, j, sources)
            fetched = self._fetch(queries[j], key_j, value_j, pair, flow, detail_j, known)
            gathered.append(self._fuse(*fetched, own=values[j], target=j, sources=sources).to(query.dtype))
            del fetched  # so that no more than one target's sources are held
        aggregated = stack_frames(gathered).flatten(0, 1)
        return self.project(aggregated).unflatten(0, (b, t)) + features

    def _pair_halves(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution of cat[query, key] as a sum of two, each computed once a frame."""
        weight_q, weight_k = self.pair.weight.chunk(2, dim=1)
        frames = query.shape[:2]
        of_query = convolve3x3(query.flatten(0, 1), weight_q, self.pair.bias).unflatten(0, frames)
        of_key = convolve3x3(key.flatten(0, 1), weight_k).unflatten(0, frames)
        return of_query, of_key

    def _guidance(
        self,
        spectra: ClipSpectra,
        keys: Float[Tensor, "b s e h w"],
        flow: Tensor | None,
        target: int,
        sources: list[int],
    ) -> OffsetGuidance:
        """For sampling the sources on their way to the target; a flow leaves it what remains."""
        assert self.guidance is not None
        seen = spectra.frames(sources) if flow is None else self.guidance.spectra([_warp_each(keys, flow)])
        return self.guidance.toward(seen, spectra.frames([target] * len(sources)))[0]

    def _fuse(
        self,
        fetched: Float[Tensor, "b s e h w"],
        relevance: Float[Tensor, "b s h w"],
        detail: Float[Tensor, "b s h w"] | None,
        *,
        own: Float[Tensor, "b e h w"],
        target: int,
        sources: list[int],
    ) -> Float[Tensor, "b e h w"]:
        """What one frame takes over of what it fetched: a softmax over sources."""
        if self.fusion is not None:
            return self.fusion(fetched, relevance, own, detail, target=target, sources=sources)
        return (relevance.softmax(1)[:, :, None] * fetched).sum(1)

    def _fetch(
        self,
        query: Float[Tensor, "b e h w"],
        keys: Float[Tensor, "b s e h w"],
        values: Float[Tensor, "b s e h w"],
        pair: Float[Tensor, "b s e h w"],
        flow: Float[Tensor, "b s 2 h w"] | None,
        detail: Float[Tensor, "b s 1 h w"] | None,
        known: OffsetGuidance | None,
    ) -> tuple[Float[Tensor, "b s e h w"], Float[Tensor, "b s h w"], Float[Tensor, "b s h w"] | None]:
        """The answers of s sources to one frame, how well they fit its query, and ``detail`` read at their places."""
        b, s = keys.shape[:2]
        guide = guided(lrelu(self.refine(lrelu(pair).flatten(0, 1))), known)
        displacement, modulation = self.offsets(guide, None if flow is None else flow.flatten(0, 1), known)
        queries = query[:, None].expand(b, s, *query.shape[1:]).flatten(0, 1)
        fetched, best, taps = deform_attend(
            queries, keys.flatten(0, 1), values.flatten(0, 1), displacement, modulation, self.top_k
        )
        share = best.softmax(1)
        if detail is not None:
            places, weight = pick(displacement, taps), pick(modulation, taps) * share[:, None]
            detail = _fetch_detail(detail.flatten(0, 1), places, weight)[:, 0].unflatten(0, (b, s))
        return fetched.unflatten(0, (b, s)), (share * best).sum(1).unflatten(0, (b, s)), detail


def _fetch_detail(
    detail: Float[Tensor, "b 1 h w"], places: Float[Tensor, "b g k 2 h w"], weight: Float[Tensor, "b g k h w"]
) -> Float[Tensor, "b 1 h w"]:
    """A map read where the values are, averaged over groups; a mean over taps, since modulation is a gain of values."""
    mean = weight / (weight.sum(2, keepdim=True).clamp_min(1e-12) * weight.shape[1])
    # the same map for all groups: their taps are taps of one group
    return deform_sum(detail, places.flatten(1, 2)[:, None], mean.flatten(1, 2)[:, None])


def _warp_each(x: Float[Tensor, "b s c h w"], flow: Float[Tensor, "b s 2 h w"]) -> Float[Tensor, "b s c h w"]:
    return warp(x.flatten(0, 1), flow.flatten(0, 1)).unflatten(0, x.shape[:2])
