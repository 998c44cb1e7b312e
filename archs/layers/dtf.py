"""Dynamic temporal filtering: a frequency response over time, predicted per location (Long et al., ECCV 2022, "DTF").

Frames are aggregated with their next ones, go through a Fourier transform over *time*, are multiplied by complex
filters that the features and their correlation predict, mixed across channels, normalised and transformed back:

    out = x + irfft(scale * norm(W (F(e, cor) * rfft(e)))) + bias,    scale and bias zero at the start

The default follows the published *code*, whose numbers are reproduced (measured: golden tests); the paper's text has
neither W, norm, scale and bias nor a softmax over the correlation (eq. 6-7), and shares filters otherwise.
``sharing="paper"``, ``predictor="resample" | "taps"``, ``norm="gn" | "none"`` and ``bidirectional`` are reconstructions
or our own: no published weights fit them, but for "resample", which takes those of "native".

The filter sees all frames of a clip, and time is circular: the first frame is a neighbour of the last.
"""

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import lrelu
from archs.layers.spectral import reflect_pad

TAPS = tuple(product(range(3), repeat=2))  # (row, column) of the 3x3 neighbourhood, row by row
SHARINGS, PREDICTORS, NORMS = ("code", "paper"), ("native", "resample", "taps"), ("bn", "gn", "none")

# our key of a block -> the published one; "weights_cor" is the constant 1/C in all that is published
PUBLISHED_KEYS = {
    "scale": "alpha1",
    "bias": "bias",
    "mixing": "linear1.complex_weight",
    "predictor.weight": "filter_g.weight",
    "norm.running_mean": "norm1.norm.running_mean",
    "norm.running_var": "norm1.norm.running_var",
    "norm.num_batches_tracked": "norm1.norm.num_batches_tracked",
    "correlation_weight": "weights_cor",
}


def published_part(key: str) -> str:
    """The name that the published code gives to our ``key`` of a `DTFBlock`; ValueError where it has no such part."""
    if key not in PUBLISHED_KEYS:
        raise ValueError(f"{key}: no published weights fit predictor='taps'; choose 'native' or 'resample'")
    return PUBLISHED_KEYS[key]


class DTFBlock(nn.Module):
    """Dynamic temporal filter of features (B, C, T, H, W): any T, H and W; the identity at the start.

    ``clip_length`` is the T it is trained for. ``predictor`` says what happens at others: "native" filters windows of
    ``clip_length`` frames, blended by triangles, and mirrors clips that are shorter; "resample" stretches the
    predictor's input and its filters to the clip; "taps" predicts filters of 2 * radius + 1 frames, which have a
    response for every length. ``sharing`` says which filters are equal: `ClipPredictor`.

    ``norm``: "bn" as published, over batch, frequencies and places, of statistics that need large batches and frames
    like the trained ones; "gn" divides by the root mean square over channels and frequencies of each location; "none"
    bounds the filters by tanh instead, since the path is cubic in x. ``bidirectional``, for "taps", aggregates the
    frame before as well, and predicts from both correlations. Computes in float32 at least, the dtype of x out. Raises
    ValueError for an unknown choice or a ``dim`` that does not divide.
    """

    def __init__(
        self,
        dim: int,
        clip_length: int,
        *,
        groups: int = 16,
        sharing: str = "code",
        predictor: str = "native",
        norm: str = "bn",
        radius: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        choices = {"sharing": (sharing, SHARINGS), "predictor": (predictor, PREDICTORS), "norm": (norm, NORMS)}
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
        if clip_length < 1:
            raise ValueError(f"clip_length={clip_length} is less than one frame")
        self.dim, self.clip_length = dim, clip_length
        self.windowed, self.bounded, self.bidirectional = predictor == "native", norm == "none", bidirectional
        self.predictor: ClipPredictor | TapPredictor
        if predictor == "taps":
            if sharing != "paper":
                raise ValueError("predictor='taps' shares filters as the paper does: set sharing='paper'")
            self.predictor = TapPredictor(dim, groups, radius, directions=1 + bidirectional)
        elif bidirectional:
            raise ValueError(
                f"bidirectional is for predictor='taps', not {predictor!r}, whose frames see the next alone"
            )
        else:
            self.predictor = ClipPredictor(dim, clip_length, groups, sharing)
        self.mixing = nn.Parameter(0.02 * torch.randn(dim, dim, 2))  # (out, in, re and im)
        self.norm = {"bn": nn.BatchNorm3d(dim, affine=False), "gn": RMSNorm(), "none": nn.Identity()}[norm]
        self.scale = nn.Parameter(torch.zeros(1, dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1, 1, 1))
        # (C, T, 3, 3) of a published file that is not constant; None stands for 1/C and is not in the state_dict
        self.register_buffer("correlation_weight", None)
        self.correlation_weight: Tensor | None

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """The filtered clip."""
        with torch.autocast(x.device.type, enabled=False):
            features = x.to(torch.promote_types(x.dtype, torch.float32))
            fits = not self.windowed or x.shape[2] == self.clip_length
            change = self.change(features) if fits else self._windows(features)
            return (features + change + self.bias).to(x.dtype)

    def change(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """What the filter adds to a clip, less the bias: equations of the paper's section 3, as in the code."""
        frames = x.shape[2]
        correlation = local_correlation(x, self.correlation_weight)  # (B, 9, T, H, W)
        enhanced = add_next_frame(x, correlation)
        if self.bidirectional:
            backward = x.flip(2)
            earlier = local_correlation(backward)
            enhanced = enhanced + (add_next_frame(backward, earlier) - backward).flip(2)
            correlation = torch.cat([correlation, earlier.flip(2)], 1)
        filters = self.predictor(torch.cat([enhanced, correlation], 1))  # (B, C, T//2+1, H, W, 2)
        if self.bounded:
            filters = filters.tanh()
        spectrum = torch.fft.rfft(enhanced, dim=2, norm="ortho")  # (B, C, T//2+1, H, W)
        mixing = torch.view_as_complex(self.mixing.to(x.dtype))
        mixed = torch.einsum("oc,bcmhw->bomhw", mixing, spectrum * torch.view_as_complex(filters.contiguous()))
        return torch.fft.irfft(self._normalised(mixed) * self.scale.to(x.dtype), n=frames, dim=2, norm="ortho")

    def _normalised(self, spectrum: Complex[Tensor, "b c m h w"]) -> Complex[Tensor, "b c m h w"]:
        """Real and imaginary parts are samples of the same channel: one mean and one variance for both."""
        values = torch.view_as_real(spectrum).flatten(-2)  # (B, C, M, H, 2W)
        if isinstance(self.norm, nn.BatchNorm3d) and not self.training:  # statistics may be in half precision
            mean, var = self.norm.running_mean, self.norm.running_var
            assert mean is not None and var is not None
            values = F.batch_norm(values, mean.to(values.dtype), var.to(values.dtype), eps=self.norm.eps)
        else:
            values = self.norm(values)
        return torch.view_as_complex(values.unflatten(-1, (-1, 2)).contiguous())

    def _windows(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """`change` of a clip of another length, through clips of the native one."""
        frames, size = x.shape[2], self.clip_length
        if frames < size:
            mirrored = reflect_pad(x.flatten(3), (0, size - frames), (0, 0)).unflatten(3, x.shape[3:])
            return self.change(mirrored)[:, :, :frames]
        starts = [*range(0, frames - size, max(size // 2, 1)), frames - size]
        clips = torch.stack([x[:, :, start : start + size] for start in starts])  # (windows, B, C, T, H, W)
        changes = self.change(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        rising = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)
        triangle = torch.minimum(rising, rising.flip(0))[:, None, None]
        total, weight = torch.zeros_like(x), x.new_zeros(frames, 1, 1)
        for start, part in zip(starts, changes, strict=True):
            total[:, :, start : start + size] += part * triangle
            weight[start : start + size] += triangle
        return total / weight


# ---- frames that look at their next ones


def local_correlation(
    x: Float[Tensor, "b c t h w"], weight: Float[Tensor, "c t 3 3"] | None = None
) -> Float[Tensor, "b 9 t h w"]:
    """Products of each place in the frame before with its 3x3 neighbourhood in the frame, averaged over channels.

    Tap 3 * row + column, zero outside of the map; frame 0 is correlated with itself. ``weight`` is what channels and
    taps count in the sum, 1/C each when None. One shifted product at a time: no matrix of all pairs of places.
    """
    before = torch.cat([x[:, :, :1], x[:, :, :-1]], 2)
    taps = []
    for (row, column), shifted in zip(TAPS, _neighbours(x), strict=True):
        if weight is None:
            taps.append((before * shifted).mean(1))
        else:
            taps.append(torch.einsum("bcthw,bcthw,ct->bthw", before, shifted, weight[:, :, row, column].to(x.dtype)))
    return torch.stack(taps, 1)


def add_next_frame(
    x: Float[Tensor, "b c t h w"], correlation: Float[Tensor, "b 9 t h w"]
) -> Float[Tensor, "b c t h w"]:
    """Frame-wise aggregation: to each frame add the neighbourhood in the next, by the softmax of `local_correlation`.

    The last frame stays. Taps outside of the map take part in the softmax, as in the published code, and add nothing.
    """
    later = x[:, :, 1:]
    attention = correlation[:, :, 1:].softmax(1)
    found = torch.zeros_like(later)
    for tap, shifted in enumerate(_neighbours(later)):
        found = torch.addcmul(found, attention[:, tap, None], shifted)
    return torch.cat([x[:, :, :-1] + found, x[:, :, -1:]], 2)


def _neighbours(x: Tensor) -> Iterator[Tensor]:
    """The map shifted so that each place holds its neighbour, for the nine of `TAPS`."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    for row, column in TAPS:
        yield padded[..., row : row + h, column : column + w]


# ---- predictors of filters: features, correlation -> response of every channel, bin of time and place


class ClipPredictor(nn.Module):
    """The published predictor: one linear map of all channels and frames of a location, (C + 9) * T -> C * M / 8.

    M = T//2 + 1 bins. ``sharing="code"`` repeats each value 16 times along (C, M, re and im), which makes real and
    imaginary parts equal; ``sharing="paper"`` has complex filters over M that 16 channels share. Both have as many
    parameters. Clips of another length are stretched to the native one, and so is the response to their bins: ours.
    """

    def __init__(self, dim: int, clip_length: int, groups: int = 16, sharing: str = "code") -> None:
        super().__init__()
        self.dim, self.clip_length, self.groups, self.sharing = dim, clip_length, groups, sharing
        self.bins = clip_length // 2 + 1
        values = dim * self.bins * 2
        if (dim if sharing == "paper" else values) % groups:
            what = f"dim={dim}" if sharing == "paper" else f"dim={dim} x {self.bins} bins x 2"
            raise ValueError(f"{what} does not divide by groups={groups}")
        self.weight = nn.Parameter(torch.empty(values // groups, (dim + len(TAPS)) * clip_length, 1, 1))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b c m h w 2"]:
        """(B, C + 9, T, H, W) -> the filters at T//2 + 1 bins, real and imaginary parts."""
        frames = x.shape[2]
        if frames != self.clip_length:
            places = torch.linspace(0, frames - 1, self.clip_length, device=x.device, dtype=x.dtype)
            x = torch.einsum("st,bdthw->bdshw", _linear(places, frames), x)
        values = F.conv2d(x.flatten(1, 2), self.weight.to(x.dtype))  # channel-major, time-minor
        if self.sharing == "code":
            filters = values.repeat_interleave(self.groups, 1).unflatten(1, (self.dim, self.bins, 2))
        else:
            filters = values.unflatten(1, (-1, self.bins, 2)).repeat_interleave(self.groups, 1)
        if frames != self.clip_length:
            bins = torch.arange(frames // 2 + 1, device=x.device, dtype=x.dtype) * (self.clip_length / frames)
            filters = torch.einsum("nm,bcmrhw->bcnrhw", _linear(bins, self.bins), filters)
        return filters.movedim(3, -1)


class TapPredictor(nn.Module):
    """Filters of 2 * radius + 1 frames, whose response F(m) = sum_k h[k] exp(-2 pi i m k / T) every length has.

    Convolution over three frames, lrelu, mean over time, a linear map to C / groups filters. Ours. ``directions`` is 2
    where the correlation with the next frame comes beside that with the one before.
    """

    def __init__(self, dim: int, groups: int = 16, radius: int = 1, directions: int = 1) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"dim={dim} does not divide by groups={groups}")
        if radius < 0:
            raise ValueError(f"radius={radius} frames is negative")
        self.groups, self.radius = groups, radius
        hidden = max(dim // 4, 8)
        self.gather = nn.Conv3d(dim + directions * len(TAPS), hidden, (3, 1, 1), padding=(1, 0, 0))
        self.taps = nn.Conv2d(hidden, dim // groups * (2 * radius + 1), 1)

    def forward(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b c m h w 2"]:
        """(B, C + 9, T, H, W) -> the filters at T//2 + 1 bins, real and imaginary parts."""
        frames = x.shape[2]
        gather, gather_bias, taps, taps_bias = (parameter.to(x.dtype) for parameter in self.parameters())
        hidden = lrelu(F.conv3d(x, gather, gather_bias, padding=(1, 0, 0))).mean(2)
        kernels = F.conv2d(hidden, taps, taps_bias).unflatten(1, (-1, 2 * self.radius + 1))  # (B, C/groups, taps, H, W)
        bins = torch.arange(frames // 2 + 1, device=x.device, dtype=x.dtype)
        delays = torch.arange(-self.radius, self.radius + 1, device=x.device, dtype=x.dtype)
        angle = -2 * torch.pi / frames * bins[:, None] * delays
        wave = torch.stack([angle.cos(), angle.sin()])  # (2, M, taps)
        return torch.einsum("rmk,bgkhw->bgmhwr", wave, kernels).repeat_interleave(self.groups, 1)


def _linear(places: Float[Tensor, " n"], count: int) -> Float[Tensor, "n {count}"]:
    """Weights of linear interpolation at ``places`` among samples 0..count-1, the ends repeated beyond."""
    samples = torch.arange(count, device=places.device, dtype=places.dtype)
    return (1 - (places.clamp(0, count - 1)[:, None] - samples).abs()).clamp_min(0)


class RMSNorm(nn.Module):
    """Divide spectra by their root mean square over channels and frequencies, each location by its own.

    A GroupNorm of one group per location without the mean, whose subtraction would add an impulse in time.
    """

    def forward(self, x: Float[Tensor, "b c m h w2"]) -> Float[Tensor, "b c m h w2"]:
        """Real and imaginary parts side by side in the last axis, as `torch.view_as_real` flattened gives them."""
        parts = x.unflatten(-1, (-1, 2))
        return (parts * (parts.square().mean((1, 2, -1), keepdim=True) + 1e-5).rsqrt()).flatten(-2)
