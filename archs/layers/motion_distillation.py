"""Motion that a network is shown in training and has to guess at inference: spectra teach, offset features learn.

Two feature maps a and b differ by motion and by a change of blur. In frequency, their *linear* difference says nothing
that the two maps do not say already, since F(b - a) = F(b) - F(a). New to a convolution are the nonlinear ones: the
phase of the product F(b) F(a)*, which is the motion, and the ratio of log amplitudes, which is the change of blur
(`temporal_gradient`). `MotionBranch` makes motion features M of them.

`MotionDistillation` adds M to a network's offset features: always (``motion="explicit"``), or in training only
("distilled"). Then `MotionStudent` predicts the density q of M from the offset features S alone, the loss is the mean
of -log q(M | S) with M detached, and at inference the mean of q stands in for M: the branch need not run. That is
variational information distillation (VID; Ahn et al., CVPR 2019): H(M) + E log q(M | S) is a lower bound of the mutual
information I(M; S), tight for the true density. Both densities and the factors 0.1 and 0.001 of their scales are
those of PISR's released program (Lee et al., ECCV 2020); M itself and its use are our own reconstruction of an idea.
M costs little: distillation is for robustness, not for speed.
"""

from collections.abc import Callable
from math import pi
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.blocks import conv1x1, conv3x3, lrelu, zero
from archs.layers.phase_correlation import whiten
from archs.layers.spectral import frequencies, hann, irfft2, overlap_add, rfft2, windows

FAINT = 1e-4  # of the strongest bin: what has less energy does not change, as it has no phase for `whiten`
NOTHING = 1e-12  # keeps quotients of empty maps finite

Gradient = Literal["diff", "logamp", "phase", "all"]
Motion = Literal["explicit", "distilled", "student"]
MotionLoss = Literal["laplace", "gaussian", "infonce"]
Density = Callable[[Tensor, Tensor, Tensor], Tensor]

PARTS: dict[str, tuple[str, ...]] = {
    "diff": ("diff",), "logamp": ("logamp",), "phase": ("phase",), "all": ("diff", "logamp", "phase")
}  # fmt: skip
WIDTH = {"diff": 2, "logamp": 1, "phase": 2}  # features a channel


# ---- frequency-temporal gradients


def temporal_gradient(
    a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], kind: Gradient = "all"
) -> Float[Tensor, "b k h w//2+1"]:
    """How two maps differ, at every bin of their half spectra A and B (float32), concatenated over channels.

    - "diff", 2C features: real and imaginary part of B - A. Linear, hence nothing new; for comparison.
    - "logamp", C: log |B| - log |A|, the change of blur; 0 for what has only moved.
    - "phase", 2C: real and imaginary part of B A* / |B A*|, exp(-2 pi i f.s) for b(p) = a(p - s); gains do not count.
    - "all", 5C: these in this order.

    Bins fade to 0 whose energy is below 1e-4 of the strongest one's. Subtract the mean first where it is large.
    """
    parts = _gradients(rfft2(a), rfft2(b), PARTS[kind])
    return torch.cat(parts, dim=1)


def _gradients(a: Tensor, b: Tensor, kinds: tuple[str, ...]) -> list[Float[Tensor, "b k *rest"]]:
    """The features of spectra (B, C, ..., h, wf), by kind."""
    compute = {"diff": _difference, "logamp": _log_ratio, "phase": _phase}
    return [compute[kind](a, b) for kind in kinds]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return _parts(b - a)


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    energy_a, energy_b = (torch.view_as_real(x).square().sum(-1) for x in (a, b))
    floor = FAINT * torch.maximum(energy_a, energy_b).amax((-2, -1), keepdim=True) + NOTHING
    return 0.5 * ((energy_b + floor).log() - (energy_a + floor).log())


def _phase(a: Tensor, b: Tensor) -> Tensor:
    return _parts(whiten(b * a.conj()))


def _parts(spectrum: Complex[Tensor, "b c *rest"]) -> Float[Tensor, "b 2*c *rest"]:
    real = torch.view_as_real(spectrum)
    return torch.cat([real[..., 0], real[..., 1]], dim=1)


class MotionBranch(nn.Module):
    """Motion features M of two feature maps: their difference, filtered by gains that phase and amplitudes decide.

    Both maps are projected to ``motion_channels`` = max(C // 4, 1) channels and cut into overlapping windows of
    ``window`` px (so that a crop and a frame look alike and objects may move differently), without mean, of unit
    energy. Per bin, two 1x1 convolutions turn the nonlinear gradients of ``gradient`` and the radius into complex gains
    1 + g of the difference B - A. Hence maps that are equal have no motion features, gains of both maps at once change
    nothing, and a common shift by half a window shifts M. ``gradient="diff"`` leaves g to the radius alone: a linear
    filter of the difference. Ours: inspired by the spectral alignment of Zhu et al. (ICCV 2023), of which the abstract
    alone is public.
    """

    def __init__(self, channels: int, *, gradient: Gradient = "all", window: int = 32) -> None:
        super().__init__()
        if gradient not in PARTS:
            raise ValueError(f"gradient={gradient!r} is none of {', '.join(PARTS)}")
        if window < 2 or window % 2:
            raise ValueError(f"window={window} px is not even")
        self.window, self.motion_channels = window, motion_channels(channels)
        self.steering = tuple(kind for kind in PARTS[gradient] if kind != "diff")
        seen = 1 + self.motion_channels * sum(WIDTH[kind] for kind in self.steering)
        self.reduce = nn.Conv2d(channels, self.motion_channels, 1, bias=False)  # a bias has no difference
        self.widen = conv1x1(seen, 32)
        self.gains = conv1x1(32, 2 * self.motion_channels)

    def forward(self, fa: Float[Tensor, "b c h w"], fb: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m h w"]:
        """From ``fa`` to ``fb``, in the dtype of ``fa``."""
        both = self.reduce(torch.cat([fa, fb]))
        a, b = self._spectra(both)
        with torch.autocast(fa.device.type, enabled=False):
            radius = frequencies(self.window, self.window, a.device).radius.expand(len(a), 1, *a.shape[2:])
            steering = torch.cat([radius, *_gradients(a, b, self.steering)], dim=1)  # (B, k, nh, nw, s, wf)
        flat = steering.flatten(4, 5).flatten(2, 3).to(both.dtype)
        gains = self.gains(F.gelu(self.widen(flat))).float().unflatten(1, (2, -1))
        with torch.autocast(fa.device.type, enabled=False):
            change = torch.complex(1 + gains[:, 0], gains[:, 1]).view_as(a) * (b - a)
            parts = irfft2(change, (self.window, self.window))
            return overlap_add(parts, fa.shape[-2:], self.window // 2, fa.dtype)

    def _spectra(self, both: Float[Tensor, "two_b m h w"]) -> tuple[Tensor, ...]:
        """Half spectra (B, m, nh, nw, s, wf) of the tapered windows of either map."""
        size, hop = self.window, self.window // 2
        with torch.autocast(both.device.type, enabled=False):
            parts = windows(both.float(), size, hop, margin=size - hop)
            parts = (parts - parts.mean((-2, -1), keepdim=True)) * hann(size, size, both.device).sqrt()
            pair = parts.unflatten(0, (2, -1))
            energy = pair.square().mean((0, 2, -2, -1), keepdim=True)  # of a window: both maps, all channels
            return rfft2(pair * (energy + NOTHING).rsqrt()).unbind(0)


def motion_channels(channels: int) -> int:
    """How many motion features there are beside ``channels`` features."""
    return max(channels // 4, 1)


# ---- what one variable tells of another


def laplace_nll(target: Float[Tensor, "*#n"], mu: Float[Tensor, "*#n"], b: Float[Tensor, "*#n"]) -> Tensor:
    """-log of the Laplace density of scale b > 0, in nats and float32: log(2b) + |mu - t| / b."""
    mu, b = mu.float(), b.float()
    return (2 * b).log() + (mu - target.float()).abs() / b


def gaussian_nll(target: Float[Tensor, "*#n"], mu: Float[Tensor, "*#n"], v: Float[Tensor, "*#n"]) -> Tensor:
    """-log of the Gaussian density of variance v > 0, in nats and float32: log(2 pi v) / 2 + (mu - t)^2 / 2v."""
    mu, v = mu.float(), v.float()
    return 0.5 * ((2 * pi * v).log() + (mu - target.float()).square() / v)


DENSITIES: dict[str, tuple[Density, float]] = {  # negative logarithm, factor of softplus in the scale (source: PISR)
    "laplace": (laplace_nll, 0.1),
    "gaussian": (gaussian_nll, 0.001),
}


def positive(x: Float[Tensor, "*n"], factor: float) -> Float[Tensor, "*n"]:
    """A scale from a number of any sign, factor * softplus(x) + 1e-8 (PISR); float32, where 1e-8 is not nothing."""
    return factor * F.softplus(x.float()) + 1e-8


def information_bound(entropy: float, nll: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """H(M) - E[-log q(M | S)] <= I(M; S), in nats a scalar (Barber & Agakov, NIPS 2003; VID).

    ``entropy`` is the differential entropy of M, a constant where M is detached: to minimise the mean of ``nll`` is to
    maximise the bound. Equal to I(M; S) where q is the true conditional density, below it for any other.
    """
    return entropy - nll.mean()


def info_nce(
    target: Float[Tensor, "n c"], mu: Float[Tensor, "n c"], scale: Float[Tensor, "n c"], nll: Density = laplace_nll
) -> Float[Tensor, ""]:
    """Which of n predictions is the target's? The cross-entropy; log n less it is a bound of I(M; S) (InfoNCE).

    van den Oord et al., 2018. The critic is the predicted log density, so that mu stays a prediction of the target.
    The bound never exceeds log n: take many more candidates than exp(I).
    """
    logits = -nll(target[:, None], mu[None], scale[None]).sum(-1)
    return F.cross_entropy(logits, torch.arange(len(target), device=target.device))


# ---- the module


class MotionStudent(nn.Module):
    """The density of M from offset features alone: mean, and scale with ``factor``, see `positive`."""

    def __init__(self, channels: int, *, factor: float = 0.1) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.factor = factor
        self.see = conv3x3(channels, hidden)
        self.mean = conv1x1(hidden, motion_channels(channels))
        self.scale: nn.Conv2d | None = conv1x1(hidden, motion_channels(channels))

    def forward(self, offset_features: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """(mu, b or v), both (B, m, h, w), the second float32 and positive, or None once it was dropped."""
        seen = lrelu(self.see(offset_features))
        return self.mean(seen), None if self.scale is None else positive(self.scale(seen), self.factor)


class MotionDistillation(nn.Module):
    """What motion adds to offset features: (fa, fb, offset features) -> the same shape as these, to be added to them.

    A fresh one adds zeros. ``motion`` is where M comes from:

    - "explicit": the branch, always.
    - "distilled": the branch in training, the student's mean in evaluation. Each pass in training leaves the loss
      in ``distillation`` (unweighted; else it is None); `motion_losses` collects those of a network for its
      `auxiliary_losses`. Without an `AuxiliaryLoss` on it the student learns nothing. Call the module once a pass,
      pairs stacked in the batch: a second call would replace the first one's loss.
    - "student": the student's mean alone, what `drop` leaves of "distilled". Its weights are those of "distilled" less
      ``branch.*`` and ``student.scale.*``; they load strictly into a network that is built with ``motion="student"``.

    ``loss`` is the density of q ("laplace", "gaussian"), or "infonce": Laplace and, beside it, `info_nce` of at most
    256 pixels; alone, that does not make the mean a stand-in for M (on a toy: correlation below 0.6, not over 0.9).
    ``gradient`` and ``window`` are the branch's. ValueError for unknown choices.
    """

    def __init__(
        self,
        channels: int,
        *,
        motion: Motion = "distilled",
        gradient: Gradient = "all",
        loss: MotionLoss = "laplace",
        window: int = 32,
    ) -> None:
        super().__init__()
        if motion not in ("explicit", "distilled", "student"):
            raise ValueError(f"motion={motion!r} is none of explicit, distilled, student")
        if loss not in (*DENSITIES, "infonce"):
            raise ValueError(f"loss={loss!r} is none of {', '.join(DENSITIES)}, infonce")
        self.motion, self.contrastive = motion, loss == "infonce"
        self.nll, factor = DENSITIES["laplace" if self.contrastive else loss]
        self.branch: MotionBranch | None = MotionBranch(channels, gradient=gradient, window=window)
        self.student = None if motion == "explicit" else MotionStudent(channels, factor=factor)
        self.add = zero(conv3x3(motion_channels(channels), channels))
        self.distillation: Tensor | None = None
        if motion == "student":
            self.drop()

    def forward(
        self, fa: Float[Tensor, "b c h w"], fb: Float[Tensor, "b c h w"], offset_features: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """See the class; ``fa`` and ``fb`` are the two frames' features."""
        self.distillation = None
        if self.student is None:
            assert self.branch is not None
            return self.add(self.branch(fa, fb))
        mu, scale = self.student(offset_features)
        if self.branch is None or scale is None or not self.training:
            return self.add(mu)
        shown = self.branch(fa, fb)
        self.distillation = self._loss(shown.detach(), mu, scale)
        return self.add(shown)

    def drop(self) -> None:
        """Forget the branch and the student's scale, which inference does not need: from "distilled" to "student"."""
        if self.student is None:
            raise ValueError("motion='explicit' needs its branch at inference, too; motion='distilled' does not")
        self.motion, self.branch, self.student.scale, self.distillation = "student", None, None, None

    def _loss(self, target: Tensor, mu: Tensor, scale: Tensor) -> Float[Tensor, ""]:
        loss = self.nll(target, mu, scale).mean()
        if self.contrastive:
            target, mu, scale = (x.movedim(1, -1).flatten(0, 2) for x in (target, mu, scale))
            step = -(-len(target) // 256)
            loss = loss + info_nce(target[::step], mu[::step], scale[::step], self.nll)
        return loss


def motion_losses(network: nn.Module) -> dict[str, Tensor]:
    """``{"motion": mean}`` of what the `MotionDistillation` in a network left in its last pass, {} if there is none."""
    found = [module.distillation for module in network.modules() if isinstance(module, MotionDistillation)]
    losses = [loss for loss in found if loss is not None]
    return {"motion": torch.stack(losses).mean()} if losses else {}
