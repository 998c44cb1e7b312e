"""ATM-CLIP: actions from the image encoder of CLIP whose frames meet in arithmetic (Wu et al., ICCV 2023).

The host of the released program (MIT): a vision transformer on every frame (Radford et al., ICML 2021), `ATMTokens` at
the input of one block past the middle, and in every block two shifts of the class token in time, so that published
accuracies are those of ATM and the shifts together. A frame's class token is projected, the mean over frames is
classified. Measured: the parts of ATM equal the released program's numbers; of the host, the names and shapes of all
weights are the released ones, its numbers are not measured.

No trained weights of it are public. `from_published` and `to_published` translate names for those who have some, and
for CLIP's own.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.contract import ClipClassifier
from archs.layers.atm import ATMTokens, Names, published_shape, renamed, token_names

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ATM_CLIPS: dict[str, dict[str, Any]] = {  # arguments of the published sizes
    "b16": {"patch": 16, "width": 768, "depth": 12, "heads": 12, "projected": 512, "atm_at": 7},
    "l14": {"patch": 14, "width": 1024, "depth": 24, "heads": 16, "projected": 768, "atm_at": 14},
}


class ATMCLIP(ClipClassifier):
    """Classifier and features of clips: float RGB in [0, 1], (B, T, 3, H, W), any T, H and W multiples of ``patch``.

    ``ATMCLIP(classes=400, **ATM_CLIPS["b16"])`` is the published size. ``size`` is that of the images the positions
    were learnt for; for others they are interpolated. ``atm_at`` is the block before which ATM is (None: nowhere).
    ``taps`` are the blocks whose outputs are `features`; by default one at the end of every quarter of the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, classes: int, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12,
        projected: int = 512, atm_at: int | None = 7, size: int = 224, hidden: int = 64, context: int = 5,
        taps: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(width, heads, depth, size, patch, atm_at)
        self.taps = tuple(sorted({(i + 1) * depth // 4 - 1 for i in range(4)} - {-1})) if taps is None else taps
        if not self.taps or not all(0 <= tap < depth for tap in self.taps):
            raise ValueError(f"taps={self.taps} are not blocks 0..{depth - 1}")
        self.classes, self.multiple_of = classes, patch
        self.patch_size, self.side = patch, size // patch
        self.patch = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.position = nn.Parameter(width**-0.5 * torch.randn(1 + self.side**2, width))
        self.norm_in = WideLayerNorm(width)
        self.blocks = nn.ModuleList(
            ShiftedBlock(width, heads, ATMTokens(width, hidden=hidden, context=context) if i == atm_at else None)
            for i in range(depth)
        )
        self.norm_out = WideLayerNorm(width)
        self.project = nn.Parameter(width**-0.5 * torch.randn(width, projected))
        self.head = nn.Linear(projected, classes)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of every map of `features`."""
        return (self.patch.out_channels,) * len(self.taps)

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels of the clip a pixel of every map of `features`."""
        return (self.patch_size,) * len(self.taps)

    def forward(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits; ValueError for sizes that do not divide by the patch."""
        return self.head(self.embed(clip).mean(1))

    def embed(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t projected"]:
        """CLIP's embedding of every frame, not normalised, with its neighbours seen."""
        tokens, grid = self._tokens(clip)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return self.norm_out(tokens[:, :, 0]) @ self.project

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Float[Tensor, "b t c rows columns"]]:
        """The maps of patch tokens after the blocks of ``taps``, all of 1/patch the size of the clip."""
        tokens, grid = self._tokens(clip)
        maps = []
        for i, block in enumerate(self.blocks[: max(self.taps) + 1]):
            tokens = block(tokens, grid)
            if i in self.taps:
                maps.append(tokens[:, :, 1:].transpose(2, 3).unflatten(3, grid))
        return maps

    def load_published(self, state: Mapping[str, Any]) -> None:
        """Copy weights of the released program, wrapped or not; ValueError lists names and shapes that differ."""
        weights = from_published(state)
        ours = {key: tensor.shape for key, tensor in self.state_dict().items()}
        problems = [f"missing {published_key(key)}" for key in ours.keys() - weights.keys()]
        problems += [f"unexpected {published_key(key)}" for key in weights.keys() - ours.keys()]
        problems += [
            f"{published_key(key)} is {tuple(weights[key].shape)}, not {tuple(shape)}"
            for key, shape in ours.items()
            if key in weights and weights[key].shape != shape
        ]
        if problems:
            what = "released weights of another ATM-CLIP (other classes, size, depth or atm_at?)"
            raise ValueError(f"{what}: {'; '.join(sorted(problems))}")
        self.load_state_dict(weights)

    def export_published(self) -> dict[str, Tensor]:
        """The state_dict under the released program's names, complete; tensors are shared, not copied."""
        return to_published(self.state_dict())

    def _tokens(self, clip: Tensor) -> tuple[Float[Tensor, "b t n c"], tuple[int, int]]:
        height, width = clip.shape[-2:]
        if not height or not width or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"ATM-CLIP needs height and width divisible by {self.patch_size}, not {height}x{width}; crop or resize"
            )
        maps = self.patch(((clip - self.mean) / self.std).flatten(0, 1))
        grid = (maps.shape[2], maps.shape[3])
        patches = maps.flatten(2).transpose(1, 2).unflatten(0, clip.shape[:2])  # (B, T, rows*columns, C)
        first = self.class_token.to(patches.dtype).expand(*clip.shape[:2], 1, -1)
        tokens = torch.cat([first, patches], dim=2)
        return self.norm_in(tokens + resized_positions(self.position, grid).to(tokens.dtype)), grid


def _check(width: int, heads: int, depth: int, size: int, patch: int, atm_at: int | None) -> None:
    if width % heads:
        raise ValueError(f"width={width} does not divide by heads={heads}")
    if size < patch or size % patch:
        raise ValueError(f"size={size} is not a multiple of patch={patch}")
    if atm_at is not None and not 0 <= atm_at < depth:
        raise ValueError(f"atm_at={atm_at} is not within 0..{depth - 1}")


def resized_positions(position: Float[Tensor, "n c"], grid: tuple[int, int]) -> Float[Tensor, "m c"]:
    """Positions of a class token and a square of patches, bicubic at another (rows, columns); the same at its own."""
    side = round((len(position) - 1) ** 0.5)
    if grid == (side, side):
        return position
    square = position[1:].float().T.unflatten(1, (side, side))[None]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)[0]
    return torch.cat([position[:1], resized.flatten(1).T.to(position.dtype)])


class ShiftedBlock(nn.Module):
    """Pre-norm attention and MLP in every frame, each after a shift of the class token; ATM, if any, comes first."""

    def __init__(self, width: int, heads: int, atm: ATMTokens | None = None) -> None:
        super().__init__()
        self.heads, self.atm = heads, atm
        self.shift1, self.shift2 = ClassTokenShift(width), ClassTokenShift(width)
        self.norm1, self.norm2 = WideLayerNorm(width), WideLayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Float[Tensor, "b t n c"], grid: tuple[int, int]) -> Float[Tensor, "b t n c"]:
        """Class token first, then the patches of a (rows, columns) ``grid``."""
        if self.atm is not None:
            tokens = self.atm(tokens, grid)
        tokens = self.shift1(tokens)
        tokens = tokens + self._attend(self.norm1(tokens))
        tokens = self.shift2(tokens)
        wide = self.widen(self.norm2(tokens))
        return tokens + self.narrow(wide * torch.sigmoid(1.702 * wide))  # CLIP's GELU

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = parts.flatten(1, 2)  # (B*T, heads, n, C/heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.attended(mixed.transpose(1, 2).flatten(2)).unflatten(0, tokens.shape[:2])


class ClassTokenShift(nn.Module):
    """A depthwise convolution of three frames on the class tokens; the other tokens pass by.

    A fresh one takes a quarter of the channels from the next frame, a quarter from the previous one (zero beyond the
    clip) and leaves the rest.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[: width // 4, 0, 2] = 1
            self.conv.weight[width // 4 : width // 2, 0, 0] = 1
            self.conv.weight[width // 2 :, 0, 1] = 1

    def forward(self, tokens: Float[Tensor, "b t n c"]) -> Float[Tensor, "b t n c"]:
        """Class token first."""
        first = self.conv(tokens[:, :, 0].transpose(1, 2)).transpose(1, 2)
        return torch.cat([first[:, :, None].to(tokens.dtype), tokens[:, :, 1:]], dim=2)


class WideLayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever the weights and tokens are stored in, as in CLIP."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and dtype out."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


# ---- names of the released program

_TOP: Names = (
    ("patch.", "visual.conv1."), ("class_token", "visual.class_embedding"), ("position", "visual.positional_embedding"),
    ("norm_in.", "visual.ln_pre."), ("norm_out.", "visual.ln_post."), ("project", "visual.proj"), ("head.", "fc."),
)  # fmt: skip
_BLOCK: Names = (
    ("norm1.", "ln_1."), ("norm2.", "ln_2."), ("qkv.", "attn.in_proj_"), ("attended.", "attn.out_proj."),
    ("widen.", "mlp.c_fc."), ("narrow.", "mlp.c_proj."), ("shift1.", "control_point1."), ("shift2.", "control_point2."),
    *((f"atm.{ours}", f"control_point_c.{theirs}") for ours, theirs in token_names()),
)  # fmt: skip
_OURS, _THEIRS = re.compile(r"(blocks\.)(\d+\.)"), re.compile(r"(visual\.transformer\.resblocks\.)(\d+\.)")


def published_key(key: str, *, back: bool = False) -> str:
    """The released program's name of one of our weights, or ``back``; ValueError for a name that is none."""
    block = (_THEIRS if back else _OURS).match(key)
    if block is None:
        return renamed(key, _TOP, back=back)
    beginning = "blocks." if back else "visual.transformer.resblocks."
    return beginning + block[2] + renamed(key[block.end() :], _BLOCK, back=back)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an `ATMCLIP` under the released program's names and in its shapes."""
    return {published_key(key): published_shape(key, tensor) if ".atm." in key else tensor
            for key, tensor in state.items()}  # fmt: skip


def from_published(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the released program for ``ATMCLIP.load_state_dict``; ValueError for a name that is none of its.

    Its files come from DeepSpeed: a ``{"module": weights}`` is opened, a ``module.`` before every name dropped.
    """
    weights = state["module"] if isinstance(state.get("module"), Mapping) else state
    ours = {published_key(key.removeprefix("module."), back=True): tensor for key, tensor in weights.items()}
    return {key: published_shape(key, tensor, back=True) if ".atm." in key else tensor for key, tensor in ours.items()}
