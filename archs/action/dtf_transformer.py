"""DTF-Transformer: a Swin Transformer on clips whose unshifted blocks filter over time (Long et al., ECCV 2022).

Groups of four frames become tokens of 4x4 pixels; the stages of Swin (Liu et al., ICCV 2021) see each group alone, and
`DTFBlock` between attention and MLP is all that mixes them. It stands in the blocks with unshifted windows: every
other one, and every one of a stage whose map is one window. Facts from the published code. The numbers are reproduced
(measured: golden test); no trained weights are published, so no accuracy is.

Departures: maps that do not divide by the window are padded with zeros, where the published code takes one size only.
Weights that the published code holds and never uses, 22 % of the base size for 16 frames, are left out here and put
back on export.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action.dtf_net import (
    STEM_FRAMES,
    Normalise,
    constant_correlations,
    export_published,
    groups_of_frames,
    load_published,
)
from archs.contract import ClipClassifier, and_keywords_of
from archs.layers.blocks import drop_path
from archs.layers.dtf import DTFBlock, published_part
from archs.layers.window_attention import WindowAttention, relative_positions, shift_mask

PATCH = 4  # pixels
SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "base": {"embed_dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "large": {"embed_dim": 192, "heads": (6, 12, 24, 48), "drop_path": 0.5},
}


class DTFTransformer(ClipClassifier):
    """Classifier of clips (B, T, 3, h, w) -> logits (B, classes), and `features` of the stages.

    Clips are RGB in 0..1; the ImageNet normalisation is inside. ``embed_dim``, ``heads`` and ``drop_path`` default to
    those of ``size``. ``image_size`` says in which stages the map is one window; clips of any size with sides that
    divide by 4 work. ``clip_length`` is the T of the weights; other T that divide by 4 work as ``predictor`` of
    `DTFBlock` says, which gets all other arguments. The rate of ``dropout`` is DTF-Net's. Raises ValueError.
    """

    frames_multiple_of, multiple_of = STEM_FRAMES, PATCH

    @and_keywords_of(DTFBlock, without=("dim",))
    def __init__(
        self,
        *,
        size: str = "base",
        clip_length: int = 16,
        classes: int = 400,
        image_size: int = 224,
        embed_dim: int | None = None,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        heads: tuple[int, ...] | None = None,
        window: int = 7,
        drop_path: float | None = None,
        dropout: float = 0.5,
        **dtf: Any,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size={size!r} is none of {', '.join(SIZES)}")
        width, heads = embed_dim or SIZES[size]["embed_dim"], heads or SIZES[size]["heads"]
        if len(heads) != len(depths):
            raise ValueError(f"heads={heads} and depths={depths} are of different length")
        rate = SIZES[size]["drop_path"] if drop_path is None else drop_path
        rates = [rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        frames = groups_of_frames(clip_length, "clip_length=")
        self.classes, self.clip_length, self.image_size = classes, clip_length, image_size
        self.normalise = Normalise()
        self.embed = nn.Conv3d(3, width, (STEM_FRAMES, PATCH, PATCH), (STEM_FRAMES, PATCH, PATCH))
        self.layers = nn.ModuleList()
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            ours = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            shift = window // 2 if image_size // (PATCH << i) > window else 0
            blocks = (
                DTFSwinBlock(width << i, count, window, frames, shift=shift if j % 2 else 0, drop_rate=ours[j], dtf=dtf)
                for j in range(depth)
            )
            self.layers.append(Stage(width << i, list(blocks), merges=i < len(depths) - 1))
        self.norm = nn.LayerNorm(width << (len(depths) - 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width << (len(depths) - 1), classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits of a clip, the mean over its groups of frames."""
        return self.classify(self.features(clip)[-1])

    def classify(self, last: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of the last stage's features."""
        tokens = self.norm(last.movedim(2, -1)).mean((2, 3))  # (B, T/4, C)
        return self.fc(self.dropout(tokens)).mean(1)

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Tensor]:
        """After each stage, before its patches merge: (B, T/4, C, h/s, w/s), C = 1, 2, 4, 8 times embed_dim, s = 4..32.

        Sides are rounded up.
        """
        groups_of_frames(clip.shape[1], "a clip of T=")
        return self.stages(self.normalise(clip).transpose(1, 2))

    def stages(self, x: Float[Tensor, "b 3 t h w"]) -> list[Tensor]:
        """`features` of a normalised clip in the published order."""
        if x.shape[-2] % PATCH or x.shape[-1] % PATCH:
            raise ValueError(f"DTF-Transformer needs height and width divisible by 4, not {x.shape[-2]}x{x.shape[-1]}")
        x = self.embed(x).permute(0, 2, 3, 4, 1)  # (B, T/4, h/4, w/4, C)
        found = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            x = stage(x)
            found.append(x.movedim(-1, 2))
            x = stage.merge(x)
        return found

    def load_published(self, state: Mapping[str, Any]) -> None:
        """Copy a state_dict of the published code, wrapped or not; ValueError lists keys and shapes that differ."""
        load_published(self, state, published_key, self._beside())

    def export_published(self) -> dict[str, Tensor]:
        """The state_dict under the published keys, complete: what is never used is zero."""
        return export_published(self, published_key, self._beside())

    def _beside(self) -> dict[str, Tensor]:
        """What a published state_dict holds beside ours: constants, and weights that no forward pass reads."""
        found = constant_correlations(self, published_key)
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            for j, block in enumerate(stage.blocks):
                assert isinstance(block, DTFSwinBlock)
                unused = block.unused(self.image_size // (PATCH << i))
                found |= {f"layers.{i}.blocks.{j}.{key}": tensor for key, tensor in unused.items()}
        return found


class DTFSwinBlock(nn.Module):
    """x + attention(norm(x)), the filter over time unless windows are shifted, then x + mlp(norm(x))."""

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        frames: int,
        *,
        shift: int,
        drop_rate: float,
        dtf: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.shift, self.drop_rate, self.frames = shift, drop_rate, frames
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.dtf: nn.Module = nn.Identity() if shift else DTFBlock(channels, frames, **dtf)
        self.norm2 = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w c"]:
        """Same shape out."""
        x = self._add(x, self._attend(self.norm1(x)))
        if not self.shift:
            x = self.dtf(x.movedim(-1, 1)).movedim(1, -1)
        return self._add(x, self.narrow(F.gelu(self.widen(self.norm2(x)))))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Stochastic depth drops groups of frames, each for itself, as they are the published code's batch."""
        return x + drop_path(branch.flatten(0, 1), self.drop_rate, self.training).view_as(branch)

    def _attend(self, x: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w c"]:
        h, w, side = *x.shape[2:4], self.attention.window
        maps = F.pad(x.flatten(0, 1), (0, 0, 0, -w % side, 0, -h % side))
        return self.attention(maps, self.shift)[:, :h, :w].unflatten(0, x.shape[:2])

    def unused(self, resolution: int) -> dict[str, Tensor]:
        """What the published block holds beside ours, for maps of ``resolution`` x ``resolution``."""
        channels, window = self.norm1.normalized_shape[0], self.attention.window
        found = {
            "attn.relative_position_index": relative_positions(window),
            "conv.weight": torch.zeros(channels, channels, 1, 3),
        }
        if self.shift:
            found["attn_mask"] = shift_mask(resolution, resolution, window, self.shift, torch.device("cpu"))
            idle = DTFBlock(channels, self.frames)
            for parameter in idle.parameters():
                nn.init.zeros_(parameter)
            state = {**idle.state_dict(), "correlation_weight": torch.full((channels, self.frames, 3, 3), 1 / channels)}
            found |= {f"dtf_block.{published_part(key)}": tensor for key, tensor in state.items()}
        return found


class Stage(nn.Module):
    """Blocks on maps of one size, and the merge of 2x2 patches that follows."""

    def __init__(self, channels: int, blocks: list[DTFSwinBlock], *, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge: nn.Module = PatchMerging(channels) if merges else nn.Identity()

    def forward(self, x: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w c"]:
        """Same shape out; ``merge`` is applied apart."""
        for block in self.blocks:
            x = block(x)
        return x


class PatchMerging(nn.Module):
    """Four neighbours -> one token of twice the channels, through a norm and a linear map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Float[Tensor, "b t h w c"]) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H/2, W/2, 2C), odd sides padded by zeros."""
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        order = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column), by columns as published
        return self.reduce(self.norm(torch.cat([x[:, :, i::2, j::2] for i, j in order], -1)))


_NAMES = [
    (r"^embed\.", "patch_embed.proj."),
    (r"\.attention\.position_bias$", ".attn.relative_position_bias_table"),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.project\.", ".attn.proj."),
    (r"\.widen\.", ".mlp.fc1."),
    (r"\.narrow\.", ".mlp.fc2."),
    (r"\.merge\.reduce\.", ".downsample.reduction."),
    (r"\.merge\.norm\.", ".downsample.norm."),
]  # ours -> published


def published_key(key: str) -> str:
    """The name that the published DTF-Transformer gives to our ``key``: Swin's, and others for the filter's parts."""
    block, dtf, part = key.partition(".dtf.")
    if dtf:
        return f"{block}.dtf_block.{published_part(part)}"
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key
