"""STDAN: spatial-temporal deformable attention network for space-time super-resolution (Wang et al., 2022).

T low-resolution frames in, 2T-1 frames of four times the size out: encode every frame with window attention,
interpolate the features of the frames in between (LSTFI), let all frames exchange detail by deformable attention
(STDFA), decode and upsample every frame. The defaults are the published network: 8,292,843 parameters, equal to the
reference outputs.
"""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.contract import VideoNet
from archs.layers.blocks import UPSAMPLERS, BicubicUpsample, conv3x3, interleave, lrelu, per_frame, zero
from archs.layers.deform_attention import DeformableAttention
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.motion_prior import CorrelationMotion, MiddleMotion
from archs.layers.propagation import Propagation, ResidualTrunk, WarpedMiddle
from archs.layers.window_attention import SwinTrunk


class STDAN(VideoNet):
    """(B, T, 3, h, w) -> (B, 2T-1, 3, 4h, 4w); output 2i is input i, output 2i+1 the frame half-way to i+1.

    ``channels`` .. ``drop_path`` size the network; the defaults are the published ones. Some keywords depart from
    it for networks with little training: ``skip="bicubic"`` adds the upscaled input (middle frames: its neighbours
    merged), ``motion_prior="correlation"`` starts all alignment from block matching, and ``temporal_radius`` limits
    the frames that attend to each other. Three more put convolutions in the place of attention, for networks that have
    to be fast: ``trunk="residual"`` (depths are numbers of blocks), ``between="warp"`` and ``exchange="propagation"``
    (of ``propagation_depth`` blocks), the latter two along the flows of the motion prior. ValueError for sizes and
    choices that do not fit each other.
    """

    scale = 4
    time_scale = 2
    multiple_of = 8
    min_frames = 2

    def __init__(
        self,
        *,
        channels: int = 64,
        embed_dim: int = 72,
        heads: int = 6,
        window: int = 8,
        mlp_ratio: float = 2.0,
        encoder_depths: tuple[int, ...] = (6, 6),
        decoder_depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        levels: int = 3,
        deform_groups: int = 8,
        top_k: int = 2,
        drop_path: float = 0.1,
        upsampler: Literal["pixelshuffle", "light"] = "pixelshuffle",
        upsample_width: int | None = None,
        temporal_radius: int | None = None,
        skip: Literal["bicubic"] | None = None,
        motion_prior: Literal["correlation"] | None = None,
        trunk: Literal["swin", "residual"] = "swin",
        between: Literal["lstfi", "warp"] = "lstfi",
        exchange: Literal["attention", "propagation"] = "attention",
        propagation_depth: int = 4,
    ) -> None:
        super().__init__()
        _check_choices(upsampler=upsampler, skip=skip, motion_prior=motion_prior, trunk=trunk, between=between,
                       exchange=exchange)  # fmt: skip
        if channels % deform_groups:
            raise ValueError(f"channels={channels} does not divide by deform_groups={deform_groups}")
        swin = partial(SwinTrunk, heads=heads, window=window, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.embed = conv3x3(3, channels)
        self.encoder: SwinTrunk | ResidualTrunk
        self.decoder: SwinTrunk | ResidualTrunk
        self.interpolate: FeatureInterpolation | WarpedMiddle
        self.aggregate: DeformableAttention | Propagation
        if trunk == "swin":
            self.encoder = swin(channels, embed_dim, encoder_depths)
        else:
            self.encoder = ResidualTrunk(channels, channels, sum(encoder_depths))
        if between == "lstfi":
            self.interpolate = FeatureInterpolation(channels, levels, deform_groups)
        else:
            self.interpolate = WarpedMiddle(channels)
        if exchange == "attention":
            radius = temporal_radius
            self.aggregate = DeformableAttention(channels, embed_dim, deform_groups, top_k=top_k, radius=radius)
        else:
            self.aggregate = Propagation(channels, propagation_depth)
        if trunk == "swin":
            self.decoder = swin(channels, embed_dim, decoder_depths)
        else:
            self.decoder = ResidualTrunk(channels, channels, sum(decoder_depths))
        self.upsample = UPSAMPLERS[upsampler](channels, self.scale, upsample_width)
        self.motion = CorrelationMotion() if motion_prior else None
        self.skip = BicubicUpsample(self.scale) if skip else None
        if skip:  # training starts at the upscaled input, not at noise
            zero(self.upsample.last)
            see_contrast(self.embed)
        self.multiple_of = max(
            window if trunk == "swin" else 1, 2 ** (levels - 1) if between == "lstfi" else 1, 4 if motion_prior else 1
        )

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b 2*t-1 3 4*h 4*w"]:
        """See the class."""
        self.check_clip(clip)
        motion = self.motion(clip) if self.motion is not None else None
        features = self.encode(clip)  # (B, T, C, h, w)
        between = self.interpolate(features, motion)  # (B, T-1, C, h, w)
        sequence = interleave(features, between)  # (B, U, C, h, w)
        sequence = self.gather(sequence, motion)
        restored = per_frame(self.upsample, per_frame(self.decoder, sequence)).contiguous()
        return restored if self.skip is None else restored + self._upscaled(clip, motion)

    def heavy_modules(self) -> list[nn.Module]:
        """The groups of both trunks, interpolation, aggregation and the upsampler."""
        return [*self.encoder.groups, self.interpolate, self.aggregate, *self.decoder.groups, self.upsample]

    def encode(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h w"]:
        """Features of every input frame."""
        return per_frame(self.encoder, lrelu(per_frame(self.embed, clip)))

    def gather(self, sequence: Float[Tensor, "b u c h w"], motion: MiddleMotion | None) -> Float[Tensor, "b u c h w"]:
        """Every frame with what it takes from the others."""
        return self.aggregate(sequence, motion.frames() if motion else None)

    def _upscaled(self, clip: Tensor, motion: MiddleMotion | None) -> Tensor:
        """The global skip: bicubic frames, neighbours merged for the frames in between."""
        assert self.skip is not None
        between = (clip[:, :-1] + clip[:, 1:]) / 2 if motion is None else motion.merge(clip)
        return per_frame(self.skip, interleave(clip.float(), between.float()))


@torch.no_grad()
def see_contrast(embed: nn.Conv2d, mean: float = 0.45, gain: float = 8.0) -> None:
    """Let a fresh first convolution see ``gain`` * (frame - ``mean``): contrast of order 1 instead of brightness.

    Our choice for networks with a skip. Measured with a recurrent one of 32 channels, one seed, loss of iterations
    101 to 150: 0.0516 without, 0.0509 with the gain alone, 0.0496 with both; the first 50 had 0.0537.
    """
    embed.weight.mul_(gain)
    assert embed.bias is not None
    embed.bias.sub_(mean * embed.weight.sum((1, 2, 3)))


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "upsampler": tuple(UPSAMPLERS),
    "skip": (None, "bicubic"),
    "motion_prior": (None, "correlation"),
    "trunk": ("swin", "residual"),
    "between": ("lstfi", "warp"),
    "exchange": ("attention", "propagation"),
}


def _check_choices(**chosen: str | None) -> None:
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            known = ", ".join("null" if choice is None else choice for choice in _CHOICES[name])
            raise ValueError(f"{name}={value!r} is none of {known}")
    if chosen["motion_prior"] is None and (chosen["between"] == "warp" or chosen["exchange"] == "propagation"):
        raise ValueError("between='warp' and exchange='propagation' follow flows: set motion_prior='correlation'")
