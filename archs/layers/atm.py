"""Arithmetic temporal module (ATM): frames meet their neighbours by sum, difference, product or ratio.

After Wu et al., "What Can Simple Arithmetic Operations Do for Temporal Modeling?" (ICCV 2023) and the form of its
released program (MIT), where the two differ: the context counts the frame itself, ratios are of log(1 + x) with the
context first, and the branch ends in a ReLU over the host's features, so that a fresh one is ReLU(x) and not x.
Measured: outputs equal the released program's to 1e-5.

All of it is two-dimensional convolution: the released 3D kernels have length 1 in time and along the context, so that
frames and pairs of frames are items of a batch here (`to_published`, `from_published` translate weights). Our
additions, off by default: ``final_relu=False`` (a fresh branch is the identity), ``ends="replicate"``,
``resize="bilinear"``, ``norm="group"``, ``pointwise``, and strides other than 1 and 2. Any number of frames, height and
width.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import per_frame, zero

PATCH = 9  # displacements a side of the local correlation
NOTHING = 1e-6  # added to a squared length before its root

Operation = Literal["add", "sub", "mul", "div"]
Ends = Literal["zeros", "replicate"]
Resize = Literal["sparse", "bilinear"]
Norm = Literal["batch", "group"]


def frame_pairs(
    x: Float[Tensor, "b t c h w"], context: int, ends: Ends = "zeros"
) -> tuple[Float[Tensor, "b t z c h w"], Float[Tensor, "b t z c h w"]]:
    """Anchors and their contexts: frame t beside frames t + z - Z//2 for z in 0..Z-1.

    Outside the clip frames are zero, or the nearest one (``ends="replicate"``). With Z = 1 the anchor is frame t-1
    (frame 0 for itself) and the context frame t, as in the released program.
    """
    frames = x.shape[1]
    if context == 1:
        return torch.cat([x[:, :1], x[:, :-1]], dim=1)[:, :, None], x[:, :, None]
    times = torch.arange(frames, device=x.device)[:, None] + torch.arange(context, device=x.device) - context // 2
    contexts = x[:, times.clamp(0, frames - 1)]  # (B, T, Z, C, h, w)
    if ends == "zeros":
        outside = (times < 0) | (times >= frames)
        contexts = contexts.masked_fill(outside[:, :, None, None, None], 0)
    return x[:, :, None].expand_as(contexts), contexts


def local_correlation(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], patch: int = PATCH
) -> Float[Tensor, "n {patch}*{patch} h w"]:
    """Cosine of every vector of ``a`` with those of ``b`` around its place; 0 outside the map.

    Channel u * patch + v is <a[h, w], b[h + u - patch//2, w + v - patch//2]>: u down, v to the right. One shift of
    the map at a time, so that memory grows with h*w and never with its square.
    """
    height, width = a.shape[-2:]
    a, b = _unit(a), F.pad(_unit(b), (patch // 2,) * 4)
    shifts = [(u, v) for u in range(patch) for v in range(patch)]
    return torch.stack([(a * b[..., u : u + height, v : v + width]).sum(1) for u, v in shifts], dim=1)


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half precision
    squared = wide.square().sum(1, keepdim=True)
    return x * (squared + NOTHING).rsqrt().to(x.dtype)


class ATMBranch(nn.Module):
    """One operation between frames, added to the features: (B, T, C, H, W) -> the same shape.

    Reduce to ``hidden`` channels (every ``stride``-th pixel), pair frames over ``context`` neighbours, operate, join
    the context by convolutions, expand to C with weights that start at zero, add.

    - "add": X + A, "sub": X - A, "div": log(1 + X) - log(1 + A), of anchor A and context X, both >= 0.
    - "mul": `local_correlation` of 9x9 displacements, then four convolutions over the displacements to channels; with
      ``pointwise`` two 1x1 convolutions that have the displacements as channels, a fifteenth of the multiply-adds.

    With a stride the branch writes every ``stride``-th pixel, as the released transposed convolution of kernel 1 does,
    or is upscaled (``resize="bilinear"``). ``norm="group"`` takes its statistics from single maps.
    """

    def __init__(
        self, channels: int, *, operation: Operation, hidden: int = 64, context: int = 5, stride: int = 1,
        final_relu: bool = True, ends: Ends = "zeros", resize: Resize = "sparse", norm: Norm = "batch",
        pointwise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, choices in [
            ("operation", operation, ("add", "sub", "mul", "div")), ("ends", ends, ("zeros", "replicate")),
            ("resize", resize, ("sparse", "bilinear")), ("norm", norm, ("batch", "group")),
        ]:  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}")
        for name, number in [("hidden", hidden), ("context", context), ("stride", stride)]:
            if number < 1:
                raise ValueError(f"{name}={number} is not at least 1")
        self.operation, self.context, self.stride = operation, context, stride
        self.final_relu, self.ends, self.resize = final_relu, ends, resize
        self.reduce = _conv_norm_relu(channels, hidden, norm, stride=stride)
        if operation == "mul":
            self.displacements = DisplacementEncoder(hidden, norm, pointwise=pointwise)
        self.transfer = ContextFusion(channels, hidden, context, norm)

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """Features of T frames in order of time; any T, H, W."""
        anchors, contexts = frame_pairs(per_frame(self.reduce, x), self.context, self.ends)
        shape = contexts.shape[:3]
        meeting = self._operate(anchors.flatten(0, 2), contexts.flatten(0, 2)).unflatten(0, shape)
        branch = per_frame(self.transfer, meeting).flatten(0, 1)  # (B*T, C, h, w)
        result = x + self._enlarge(branch, x.shape[-2:]).unflatten(0, shape[:2])
        return F.relu(result) if self.final_relu else result

    def _operate(self, a: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self.operation == "add":
            return x + a
        if self.operation == "sub":
            return x - a
        if self.operation == "div":
            return torch.log1p(x) - torch.log1p(a)  # both are outputs of a ReLU: |x| = x
        return self.displacements(local_correlation(a, x))

    def _enlarge(self, branch: Tensor, size: torch.Size) -> Tensor:
        if self.stride == 1:
            return branch
        if self.resize == "bilinear":
            return F.interpolate(branch, size=size, mode="bilinear", align_corners=False)
        sparse = branch.new_zeros(*branch.shape[:2], *size)
        sparse[..., :: self.stride, :: self.stride] = branch
        return sparse


class DisplacementEncoder(nn.Module):
    """Correlations of 9x9 displacements -> channels: every pixel's 9x9 image through 1, 4, 16, C, C channels to 1x1.

    With ``pointwise`` through 81, C, C channels of single pixels, which is ours.
    """

    def __init__(self, channels: int, norm: Norm = "batch", *, pointwise: bool = False) -> None:
        super().__init__()
        self.pointwise = pointwise
        if pointwise:
            first = _conv_norm_relu(PATCH**2, channels, norm, kernel=1, padding=0)
            self.convs = nn.Sequential(first, _conv_norm_relu(channels, channels, norm, kernel=1, padding=0))
            return
        self.convs = nn.Sequential(
            _conv_norm_relu(1, 4, norm),
            _conv_norm_relu(4, 16, norm, stride=2),
            _conv_norm_relu(16, channels, norm, stride=2),
            _conv_norm_relu(channels, channels, norm, padding=0),
        )

    def forward(self, correlation: Float[Tensor, "n 81 h w"]) -> Float[Tensor, "n c h w"]:
        """Displacements in the order of `local_correlation`."""
        if self.pointwise:
            return self.convs(correlation)
        n, _, height, width = correlation.shape
        images = correlation.permute(0, 2, 3, 1).reshape(n * height * width, 1, PATCH, PATCH)
        return self.convs(images).reshape(n, height, width, -1).permute(0, 3, 1, 2)


class ContextFusion(nn.Module):
    """What came of the Z pairs of a frame -> its update: (M, Z, C, h, w) -> (M, C_out, h, w), zero when fresh."""

    def __init__(self, channels_out: int, channels: int, context: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.first = _conv_norm_relu(channels, channels, norm)
        self.second = _conv_norm_relu(channels, channels, norm)
        self.fuse = _conv_norm_relu(channels * context, channels, norm)
        self.expand = zero(nn.Conv2d(channels, channels_out, 1, bias=False))

    def forward(self, pairs: Float[Tensor, "m z c h w"]) -> Float[Tensor, "m c_out h w"]:
        """The pairs pass two convolutions each, then one together, context-major."""
        together = per_frame(self.second, per_frame(self.first, pairs)).flatten(1, 2)
        return self.expand(self.fuse(together))


class ATMTokens(nn.Module):
    """The released ATM for vision transformers: multiplication, then subtraction, on the map of patch tokens.

    The class token passes by. With their final ReLU a fresh one zeroes all negative activations of patch tokens: kept,
    as weights were trained with it.
    """

    def __init__(
        self, channels: int, *, hidden: int = 64, context: int = 5, final_relu: bool = True, ends: Ends = "zeros"
    ) -> None:
        super().__init__()

        def branch(operation: Operation) -> ATMBranch:
            return ATMBranch(
                channels, operation=operation, hidden=hidden, context=context, final_relu=final_relu, ends=ends
            )

        self.multiply = branch("mul")
        self.subtract = branch("sub")

    def forward(self, tokens: Float[Tensor, "b t n c"], grid: tuple[int, int]) -> Float[Tensor, "b t n c"]:
        """Class token first, then the patches of a (rows, columns) ``grid`` row by row; ValueError if n differs."""
        if tokens.shape[2] != 1 + grid[0] * grid[1]:
            raise ValueError(f"{tokens.shape[2]} tokens are not one of the class and {grid[0]}x{grid[1]} patches")
        maps = tokens[:, :, 1:].transpose(2, 3).unflatten(3, grid)  # (B, T, C, rows, columns)
        patches = self.subtract(self.multiply(maps)).flatten(3).transpose(2, 3)
        return torch.cat([tokens[:, :, :1], patches], dim=2)


def _conv_norm_relu(
    channels_in: int, channels_out: int, norm: Norm, *, kernel: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
    scale = nn.BatchNorm2d(channels_out) if norm == "batch" else nn.GroupNorm(1, channels_out)
    return nn.Sequential(conv, scale, nn.ReLU())


# ---- names and shapes of the released program

Names = tuple[tuple[str, str], ...]  # (ours, published): beginnings of keys

_STEMS: dict[Operation, str] = {"add": "inte2vis", "sub": "diff2vis", "div": "div2vis", "mul": "sim2vis"}


def published_names(operation: Operation) -> Names:
    """Beginnings of a branch's keys, ours and the released program's."""
    stem = _STEMS[operation]
    transfer = tuple(
        (f"transfer.{ours}.", f"{stem}.{theirs}.")
        for ours, theirs in [
            ("first", "conv1"), ("second", "conv2"), ("fuse.0", "conv3_fuse.1"), ("fuse.1", "conv3_fuse.2"),
            ("expand", "upsample.0"),
        ]
    )  # fmt: skip
    if operation == "mul":
        return (("reduce.", "sim.downsample."), ("displacements.convs.", "uv2c.conv"), *transfer)
    return (("reduce.", "downsample."), *transfer)


def token_names() -> Names:
    """Beginnings of the keys of `ATMTokens`, ours and the released program's."""
    parts: list[tuple[str, str, Operation]] = [("multiply", "corrlayer", "mul"), ("subtract", "difflayer", "sub")]
    return tuple(
        (f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs, operation in parts for a, b in published_names(operation)
    )


def renamed(key: str, names: Names, *, back: bool = False) -> str:
    """The published key of one of ours, or ``back``; ValueError for a key that none of the names begins."""
    for pair in names:
        old, new = reversed(pair) if back else pair
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise ValueError(f"{key}: no weight of this ATM is called so; is it a checkpoint of another network?")


def to_published(state: Mapping[str, Tensor], names: Names, *, stride: int = 1) -> dict[str, Tensor]:
    """Our weights of a branch or token block under the published keys and in the published shapes."""
    return {renamed(key, names): published_shape(key, tensor, stride=stride) for key, tensor in state.items()}


def from_published(state: Mapping[str, Tensor], names: Names, *, stride: int = 1) -> dict[str, Tensor]:
    """Published weights of a branch or token block under our keys and in our shapes; ValueError for unknown keys."""
    ours = {renamed(key, names, back=True): tensor for key, tensor in state.items()}
    return {key: published_shape(key, tensor, stride=stride, back=True) for key, tensor in ours.items()}


def published_shape(key: str, tensor: Tensor, *, stride: int = 1, back: bool = False) -> Tensor:
    """A weight by our ``key`` in the published shape, or ``back``.

    Kernels but the first have an axis of time, of length 1; with a stride the last is that of a transposed convolution.
    """
    if tensor.ndim != (5 if back else 4) or "reduce." in key:
        return tensor
    if stride > 1 and "transfer.expand." in key:
        tensor = tensor.transpose(0, 1)
    return tensor.squeeze(2) if back else tensor.unsqueeze(2)
