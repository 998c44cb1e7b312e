"""STDAN: spatial-temporal deformable attention network for space-time super-resolution (Wang et al., 2022).

T low-resolution frames in, 2T-1 frames of four times the size out: encode every frame with window attention,
interpolate the features of the frames in between (LSTFI), let all frames exchange detail by deformable attention
(STDFA), decode and upsample every frame. The defaults are the published network: 8,292,843 parameters, equal to the
reference outputs.
"""

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action.extractors import EXTRACTORS, ActionExtractor
from archs.contract import VideoNet
from archs.layers.blocks import UPSAMPLERS, BicubicUpsample, conv3x3, interleave, lrelu, per_frame, zero
from archs.layers.deform_attention import DeformableAttention
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.motion_prior import CorrelationMotion, MiddleMotion
from archs.layers.propagation import Propagation, ResidualTrunk, WarpedMiddle
from archs.layers.window_attention import SwinTrunk

ENLARGED = 4  # output pixels per feature, but for networks on a finer grid


class STDAN(VideoNet):
    """(B, T, 3, h, w) -> (B, 2T-1, 3, 4h, 4w); output 2i is input i, output 2i+1 the frame half-way to i+1.

    ``scale=1`` and ``time_scale=1`` are for deblurring, apart or together: with ``time_scale=1`` no frame is
    interpolated, (B, T, 3, ...) -> (B, T, 3, ...); with ``scale=1`` two strided convolutions lead to a grid of a
    quarter of the size, the upsampler leads back, and the result is added to the input (as BasicVSR++ deblurs, Chan
    et al., 2022; our placement in this network). ``grid=2`` is one of half the size instead, and with
    ``embed="unshuffle"`` the pixels of a feature are channels of one convolution: both are learnt faster.

    ``channels`` .. ``drop_path`` size the network; the defaults are the published ones. Some keywords depart from
    it for networks with little training: ``skip="bicubic"`` adds the upscaled input (middle frames: its neighbours
    merged), ``motion_prior="correlation"`` starts all alignment from block matching, and ``temporal_radius`` limits
    the frames that attend to each other. Three more put convolutions in the place of attention, for networks that have
    to be fast: ``trunk="residual"`` (depths are numbers of blocks), ``between="warp"`` and ``exchange="propagation"``
    (of ``propagation_depth`` blocks), the latter two along the flows of the motion prior. ``exchange=None`` restores
    every frame alone, for comparison. ``extractor="dtf_resnet"`` or ``"atm_resnet"`` puts the first layers of an action
    network, ``channels`` wide, in the place of the encoder ("swin": the encoder of ``trunk``). ValueError for sizes and
    choices that do not fit each other.
    """

    scale = 4
    time_scale = 2
    multiple_of = 8
    min_frames = 2

    def __init__(
        self,
        *,
        scale: Literal[4, 1] = 4,
        time_scale: Literal[2, 1] = 2,
        grid: Literal[4, 2] = 4,
        embed: Literal["strided", "unshuffle"] = "strided",
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
        exchange: Literal["attention", "propagation"] | None = "attention",
        propagation_depth: int = 4,
        extractor: Literal["swin", "dtf_resnet", "atm_resnet"] = "swin",
    ) -> None:
        super().__init__()
        _check_choices(scale=scale, time_scale=time_scale, grid=grid, embed=embed, upsampler=upsampler, skip=skip,
                       motion_prior=motion_prior, trunk=trunk, between=between, exchange=exchange,
                       extractor=extractor)  # fmt: skip
        if channels % deform_groups:
            raise ValueError(f"channels={channels} does not divide by deform_groups={deform_groups}")
        self.scale, self.time_scale, self.channels = scale, time_scale, channels
        self.grid = grid // scale  # input pixels per feature
        self.embed = _embedding(embed, channels, self.grid)

        def stack(depths: tuple[int, ...]) -> SwinTrunk | ResidualTrunk:
            if trunk == "residual":
                return ResidualTrunk(channels, channels, sum(depths))
            sizes: dict[str, Any] = {"heads": heads, "window": window, "mlp_ratio": mlp_ratio, "drop_path": drop_path}
            return SwinTrunk(channels, embed_dim, depths, **sizes)

        self.encoder: SwinTrunk | ResidualTrunk | ActionExtractor
        if extractor in EXTRACTORS:
            self.encoder = EXTRACTORS[extractor](channels, dense=scale == ENLARGED)
        else:
            self.encoder = stack(encoder_depths)
        self.interpolate: FeatureInterpolation | WarpedMiddle | None = None
        if time_scale > 1 and between == "lstfi":
            self.interpolate = FeatureInterpolation(channels, levels, deform_groups)
        elif time_scale > 1:
            self.interpolate = WarpedMiddle(channels)
        self.aggregate: DeformableAttention | Propagation | None = None
        if exchange == "attention":
            radius = temporal_radius
            self.aggregate = DeformableAttention(channels, embed_dim, deform_groups, top_k=top_k, radius=radius)
        elif exchange == "propagation":
            self.aggregate = Propagation(channels, propagation_depth)
        self.decoder = stack(decoder_depths)
        self.upsample = UPSAMPLERS[upsampler](channels, grid, upsample_width)
        self.motion = CorrelationMotion() if motion_prior else None
        self.skip: nn.Module | None = None
        if skip or scale == 1:  # training starts at the (upscaled) input, not at noise
            self.skip = BicubicUpsample(scale) if scale > 1 else nn.Identity()
            zero(self.upsample.last)
            see_contrast(self.embed)
        features = [
            window if trunk == "swin" else 1, 4 if motion_prior else 1,
            2 ** (levels - 1) if isinstance(self.interpolate, FeatureInterpolation) else 1,
        ]  # fmt: skip
        self.multiple_of = max(features) * self.grid
        self.min_frames = 2 if time_scale > 1 or motion_prior else 1

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b u 3 H W"]:
        """See the class."""
        self.check_clip(clip)
        motion = self.motion(self._grid(clip)) if self.motion is not None else None
        features = self.encode(clip)  # (B, T, C, h, w), 1/4 of the output's size, or 1/2
        if self.interpolate is not None:
            features = interleave(features, self.interpolate(features, motion))  # (B, U, C, h, w)
        sequence = self.gather(features, motion)
        restored = per_frame(self.upsample, per_frame(self.decoder, sequence)).contiguous()
        return restored if self.skip is None else restored + self._upscaled(clip, motion)

    def heavy_modules(self) -> list[nn.Module]:
        """The groups of both trunks, interpolation, aggregation and the upsampler: of what there is."""
        between = [part for part in (self.interpolate, self.aggregate) if part is not None]
        return [*self.encoder.groups, *between, *self.decoder.groups, self.upsample]

    def encode(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c hg wg"]:
        """Features of every input frame, on their grid."""
        features = lrelu(per_frame(self.embed, clip))
        if isinstance(self.encoder, ActionExtractor):
            return self.encoder(clip, features)
        return per_frame(self.encoder, features)

    def gather(self, sequence: Float[Tensor, "b u c h w"], motion: MiddleMotion | None) -> Float[Tensor, "b u c h w"]:
        """Every frame with what it takes from the others."""
        if self.aggregate is None:
            return sequence
        if motion is None:
            return self.aggregate(sequence)
        return self.aggregate(sequence, motion.steps() if self.interpolate is None else motion.frames())

    def _grid(self, clip: Tensor) -> Tensor:
        """The clip at the size of the features."""
        return clip if self.grid == 1 else per_frame(partial(F.avg_pool2d, kernel_size=self.grid), clip)

    def _upscaled(self, clip: Tensor, motion: MiddleMotion | None) -> Tensor:
        """The global skip: bicubic frames, neighbours merged for the frames in between."""
        assert self.skip is not None
        if self.time_scale == 1:
            return per_frame(self.skip, clip.float())
        if motion is None:
            between = (clip[:, :-1] + clip[:, 1:]) / 2
        else:
            between = (motion if self.grid == 1 else motion.enlarged(self.grid)).merge(clip)
        return per_frame(self.skip, interleave(clip.float(), between.float()))


class StridedEmbed(nn.Sequential):
    """RGB to features on a grid of 1/2 or 1/4 of the size: a convolution of stride 2 for every halving."""

    def __init__(self, channels: int, grid: int) -> None:
        first = conv3x3(3, channels, stride=2)
        super().__init__(*([first] if grid == 2 else [first, nn.LeakyReLU(0.1), conv3x3(channels, channels, stride=2)]))


class UnshuffledEmbed(nn.Sequential):
    """RGB to features on a grid of 1/2 or 1/4 of the size: the pixels of a feature as channels, one convolution."""

    def __init__(self, channels: int, grid: int) -> None:
        super().__init__(nn.PixelUnshuffle(grid), conv3x3(3 * grid * grid, channels))


def _embedding(name: str, channels: int, grid: int) -> nn.Module:
    """RGB to features; on the grid of the pixels themselves one convolution, whatever the name."""
    if grid == 1:
        return conv3x3(3, channels)
    return (StridedEmbed if name == "strided" else UnshuffledEmbed)(channels, grid)


@torch.no_grad()
def see_contrast(embed: nn.Module, mean: float = 0.45, gain: float = 8.0) -> None:
    """Let a fresh first convolution see ``gain`` * (frame - ``mean``): contrast of order 1 instead of brightness.

    Our choice for networks with a skip. Measured with a recurrent one of 32 channels, one seed, loss of iterations
    101 to 150: 0.0516 without, 0.0509 with the gain alone, 0.0496 with both; the first 50 had 0.0537.
    """
    first = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
    assert first.bias is not None
    first.weight.mul_(gain)
    first.bias.sub_(mean * first.weight.sum((1, 2, 3)))


_CHOICES: dict[str, tuple[str | int | None, ...]] = {
    "scale": (4, 1),
    "time_scale": (2, 1),
    "grid": (4, 2),
    "embed": ("strided", "unshuffle"),
    "upsampler": tuple(UPSAMPLERS),
    "skip": (None, "bicubic"),
    "motion_prior": (None, "correlation"),
    "trunk": ("swin", "residual"),
    "between": ("lstfi", "warp"),
    "exchange": ("attention", "propagation", None),
    "extractor": ("swin", *EXTRACTORS),
}


def _check_choices(**chosen: str | int | None) -> None:
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            known = ", ".join("null" if choice is None else str(choice) for choice in _CHOICES[name])
            raise ValueError(f"{name}={value!r} is none of {known}")
    warps = chosen["between"] == "warp" and chosen["time_scale"] != 1
    if chosen["motion_prior"] is None and (warps or chosen["exchange"] == "propagation"):
        raise ValueError("between='warp' and exchange='propagation' follow flows: set motion_prior='correlation'")
    if chosen["grid"] != ENLARGED:
        if chosen["scale"] != 1:
            raise ValueError(f"grid={chosen['grid']} is for scale=1; set that, or leave grid out")
        if chosen["extractor"] != "swin":
            raise ValueError(f"grid={chosen['grid']}: extractor={chosen['extractor']!r} is for grid=4")
