"""STDAN in the order of the published program, for comparison: the same numbers from a network's own layers.

Frame pair by frame pair: no directions in one batch, the pair's convolution computed whole for every pair, offsets once
for keys and once for values, all nine samples of both. (Per-pixel matrix products, in which the published program forms
the relevances, are left out: they are slower still.) With `RESTORE_DEFORM=torch RESTORE_ATTENTION=torch` the samples
come from `grid_sample` and windows are rolled, cut and attended by PyTorch: what the published program does on a CPU.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from archs import STDAN
from archs.layers.blocks import interleave, lrelu, per_frame
from archs.layers.deform import deform_sample
from archs.layers.deform_attention import DeformableAttention
from archs.layers.feature_interpolation import FeatureInterpolation

# in the environment: no kernel of ours
PLAIN = {"RESTORE_DEFORM": "torch", "RESTORE_ATTENTION": "torch", "RESTORE_CONVOLUTION": "torch"}


def plain_forward(network: STDAN, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b u 3 H W"]:
    """What ``network``, of the published kind, gives for ``clip``, to rounding."""
    assert isinstance(network.interpolate, FeatureInterpolation)
    assert isinstance(network.aggregate, DeformableAttention)
    features = network.encode(clip)
    sequence = interleave(features, _interpolate(network.interpolate, features))
    sequence = _aggregate(network.aggregate, sequence)
    return per_frame(network.upsample, per_frame(network.decoder, sequence))


def _interpolate(layers: FeatureInterpolation, features: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t-1 c h w"]:
    frames = list(features.unbind(1))
    forward, backward = _recurrence(layers, frames), _recurrence(layers, frames[::-1])[::-1]
    both = [torch.cat(pair, dim=1) for pair in zip(forward, backward, strict=True)]
    return torch.stack([layers.fuse_directions(pair) for pair in both], dim=1)


def _recurrence(layers: FeatureInterpolation, frames: list[Tensor]) -> list[Tensor]:
    """Features between neighbouring frames, in the order given."""
    pyramids = [layers.pyramid(frame) for frame in frames]
    hidden, between = torch.zeros_like(frames[0]), []
    for first, second in pairwise(pyramids):
        merged = layers.step(layers.align(first, second), hidden, None)
        hidden = layers.step.next_hidden(merged)
        between.append(merged)
    return between


def _aggregate(layers: DeformableAttention, sequence: Float[Tensor, "b u c h w"]) -> Float[Tensor, "b u c h w"]:
    def mapped(linear: torch.nn.Linear, frame: Tensor) -> Tensor:
        return linear(layers.embed(frame).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    frames = sequence.unbind(1)
    query, key, value = ([mapped(linear, x) for x in frames] for linear in (layers.query, layers.key, layers.value))
    gathered = []
    for j in range(len(frames)):
        others = [_ask(layers, query[j], key[i], value[i]) for i in range(len(frames)) if i != j]
        answers, relevances = (torch.stack(x, dim=1) for x in zip(*others, strict=True))
        gathered.append(layers.project((relevances.softmax(1)[:, :, None] * answers).sum(1)) + frames[j])
    return torch.stack(gathered, dim=1)


def _ask(layers: DeformableAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One frame's answer (B, E, h, w) to the query and how well it fits (B, h, w)."""
    guide = lrelu(layers.refine(lrelu(layers.pair(torch.cat([query, key], dim=1)))))
    keys = deform_sample(key, *layers.offsets(guide))  # (B, E, 9, h, w)
    values = deform_sample(value, *layers.offsets(guide))
    best, taps = (keys * query[:, :, None]).sum(1).topk(layers.top_k, dim=1)
    share = best.softmax(1)[:, None]
    chosen = taps[:, None].expand(-1, keys.shape[1], -1, -1, -1)
    relevance = ((share * keys.gather(2, chosen)).sum(2) * query).sum(1)
    return (share * values.gather(2, chosen)).sum(2), relevance
