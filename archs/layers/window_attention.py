"""Shifted-window attention and the residual Swin trunk (Liu et al., ICCV 2021; SwinIR, Liang et al., ICCVW 2021).

The trunk is used twice in STDAN: as encoder of every input frame and as decoder of every output frame. Images are
channels-last inside, (M, H, W, C), and any size that divides by the window works.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers import swin_kernel
from archs.layers.blocks import conv3x3, drop_factors, drop_path, linear_rates
from archs.layers.compiled import has_amx
from archs.layers.window_kernel import MAX_DIM, MAX_TOKENS, has_kernel, window_kernel


class WindowAttention(nn.Module):
    """Multi-head attention within square windows, with a learnt bias per relative position."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"embed_dim={channels} does not divide by heads={heads}")
        self.heads, self.window = heads, window
        self.position_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.register_buffer("position_index", relative_positions(window), persistent=False)
        self.position_index: Tensor

    def forward(self, x: Float[Tensor, "m h w c"], shift: int) -> Float[Tensor, "m h w c"]:
        """Attend within windows of the image rolled by ``shift`` (0 or half a window)."""
        return self.project(attend_in_windows(self.qkv(x), self.bias(), shift))

    def bias(self) -> Float[Tensor, "heads n n"]:
        """Of [head, query, key], by their relative positions."""
        return self.position_bias[self.position_index].permute(2, 0, 1)


def attend_in_windows(
    qkv: Float[Tensor, "m h w c3"], bias: Float[Tensor, "heads n n"], shift: int
) -> Float[Tensor, "m h w c"]:
    """softmax(q k^T / sqrt(D) + bias) v within windows of n tokens, cut from the images rolled by -``shift``.

    ``bias`` is of [head, query, key]. Windows of a rolled image that hold pixels of opposite borders keep them apart.
    """
    heads, tokens = bias.shape[:2]
    dim = qkv.shape[3] // 3 // heads
    if _runs_kernels(qkv) and tokens <= MAX_TOKENS and dim <= MAX_DIM:
        storage = torch.bfloat16 if qkv.dtype == torch.bfloat16 else torch.float32
        y = window_kernel(qkv.to(storage), bias.transpose(1, 2).float(), round(tokens**0.5), shift)
        return y.to(qkv.dtype)
    return _attend_torch(qkv, bias, shift)


def _attend_torch(qkv: Tensor, bias: Tensor, shift: int) -> Tensor:
    """The definition: roll, cut, attend, put together, roll back."""
    m, h, w, c3 = qkv.shape
    heads, tokens = bias.shape[:2]
    side, dim = round(tokens**0.5), c3 // 3 // heads
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    windows = to_windows(qkv, side)  # (M, windows, tokens, 3C)
    count = windows.shape[1]
    q, k, v = windows.view(m, count, tokens, 3, heads, dim).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
    bias = bias.to(q.dtype)
    if shift:
        mask = shift_mask if torch.compiler.is_exporting() else cached_shift_mask  # an export's is no real tensor
        bias = bias + mask(h, w, side, shift, qkv.device)[:, None].to(q.dtype)  # (windows, heads, tokens, tokens)
    bias = bias.expand(count, heads, tokens, tokens).flatten(0, 1)
    # written out, not F.scaled_dot_product_attention: with a bias that learns, that takes a path several times
    # slower on a CPU
    logits = (q * dim**-0.5) @ k.transpose(-1, -2) + bias  # (M, windows*heads, tokens, tokens)
    y = logits.softmax(-1).to(v.dtype) @ v
    y = y.view(m, count, heads, tokens, dim).transpose(2, 3).flatten(3)
    y = from_windows(y, h, w)
    return y.roll((shift, shift), (1, 2)) if shift else y


def _runs_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_exporting() and has_kernel()


def to_windows(x: Float[Tensor, "m h w c"], side: int) -> Float[Tensor, "m n s c"]:
    """Cut into windows (rows of windows, then columns), the tokens of a window row by row."""
    m, h, w, c = x.shape
    x = x.view(m, h // side, side, w // side, side, c).transpose(2, 3)
    return x.reshape(m, (h // side) * (w // side), side * side, c)


def from_windows(x: Float[Tensor, "m n s c"], h: int, w: int) -> Float[Tensor, "m {h} {w} c"]:
    """The inverse of `to_windows`."""
    m, _, tokens, c = x.shape
    side = round(tokens**0.5)
    return x.view(m, h // side, w // side, side, side, c).transpose(2, 3).reshape(m, h, w, c)


def relative_positions(side: int) -> Tensor:
    """(side^2, side^2) index of the pair (query, key) into the table of relative positions."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()])
    difference = places[:, :, None] - places[:, None, :] + side - 1
    return difference[0] * (2 * side - 1) + difference[1]


def shift_mask(h: int, w: int, side: int, shift: int, device: torch.device) -> Float[Tensor, "n s s"]:
    """-100 between tokens that only the roll has brought into one window, else 0; one matrix per window."""
    region = torch.zeros(1, h, w, 1)
    cuts = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            region[:, rows, columns] = 3 * i + j
    label = to_windows(region, side)[0, :, :, 0]  # (windows, tokens)
    return ((label[:, None, :] != label[:, :, None]) * -100.0).to(device)


cached_shift_mask = lru_cache(maxsize=16)(shift_mask)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); stochastic depth on both in training."""

    def __init__(
        self, channels: int, heads: int, window: int, mlp_ratio: float, *, shift: int, drop_rate: float
    ) -> None:
        super().__init__()
        hidden = round(channels * mlp_ratio)
        self.shift, self.drop_rate = shift, drop_rate
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "m h w c"]) -> Float[Tensor, "m h w c"]:
        """Same shape out."""
        if self._at_once(x):
            return self._kernel(x)
        x = x + drop_path(self.attention(self.norm1(x), self.shift), self.drop_rate, self.training)
        hidden = F.gelu(self.widen(self.norm2(x)))
        return x + drop_path(self.narrow(hidden), self.drop_rate, self.training)

    def _at_once(self, x: Tensor) -> bool:
        """Whether the block's own kernel can do it sooner than it goes layer by layer.

        It computes in float32: where bfloat16 is several times as fast, training in that goes layer by layer.
        """
        if not (_runs_kernels(x) and swin_kernel.has_kernel()):
            return False
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if learns and has_amx() and _storage(x) == torch.bfloat16:
            return False
        hidden, channels = self.widen.weight.shape
        return swin_kernel.suits(channels, hidden, self.attention.window**2, learns=learns)

    def _kernel(self, x: Float[Tensor, "m h w c"]) -> Float[Tensor, "m h w c"]:
        """All of `forward` in one pass over the image: several times faster than layer by layer."""
        attention = self.attention
        weights = [
            *_with_norm(self.norm1, attention.qkv), attention.project.weight.float(), attention.project.bias.float(),
            attention.bias().transpose(1, 2).float(),
            *_with_norm(self.norm2, self.widen), self.narrow.weight.float(), self.narrow.bias.float(),
        ]  # fmt: skip
        if self.training and self.drop_rate > 0:
            factors = torch.stack([drop_factors(x, self.drop_rate).flatten() for _ in range(2)])
        else:
            factors = torch.ones(2, len(x))
        y = swin_kernel.swin_block_kernel(x.to(_storage(x)), weights, factors, attention.window, self.shift)
        return y.to(x.dtype)


def _storage(x: Tensor) -> torch.dtype:
    """How the kernel holds images: bfloat16 where ``x`` is or autocast makes it so, else float32."""
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _with_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32, of a linear layer that does the norm's gain and shift, too."""
    weight = linear.weight.float()
    bias = linear.bias.float() + (weight * norm.bias.float()).sum(1)
    return weight * norm.weight.float(), bias


class ResidualSwinGroup(nn.Module):
    """RSTB: blocks with alternating shift, one convolution, a residual around both."""

    def __init__(
        self, channels: int, heads: int, window: int, mlp_ratio: float, drop_rates: list[float]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, window, mlp_ratio, shift=window // 2 if i % 2 else 0, drop_rate=rate)
            for i, rate in enumerate(drop_rates)
        )
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Float[Tensor, "m h w c"]) -> Float[Tensor, "m h w c"]:
        """Same shape out."""
        y = x
        for block in self.blocks:
            y = block(y)
        return self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


class SwinTrunk(nn.Module):
    """Features -> features through residual Swin groups of the given depths, in a space of ``embed_dim`` channels."""

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        depths: tuple[int, ...],
        *,
        heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        rates = iter(linear_rates(drop_path, sum(depths)))
        self.embed = conv3x3(channels, embed_dim)
        self.norm_in = nn.LayerNorm(embed_dim)
        self.groups = nn.ModuleList(
            ResidualSwinGroup(embed_dim, heads, window, mlp_ratio, [next(rates) for _ in range(depth)])
            for depth in depths
        )
        self.norm_out = nn.LayerNorm(embed_dim)
        self.after = conv3x3(embed_dim, embed_dim)
        self.project = conv3x3(embed_dim, channels)

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        """Same shape out; frames are independent of each other."""
        embedded = self.embed(x)
        tokens = self.norm_in(embedded.permute(0, 2, 3, 1))
        for group in self.groups:
            tokens = group(tokens)
        tokens = self.norm_out(tokens)
        return self.project(self.after(tokens.permute(0, 3, 1, 2)) + embedded)
