"""Training losses; `LOSSES` and, for classifiers, `LABEL_LOSSES` are the tables from a name to a class.

Losses compare a restored clip with the truth, in float32 whatever the network computes in. Weights mean little
without a scale, so every loss tells its own against pixel L1 for a *white error* (independent Gaussian noise of
standard deviation s in every pixel of (h, w), whose pixel L1 is sqrt(2/pi) s = 0.80 s). `AuxiliaryLoss` alone compares
nothing: its value is the network's own.

Spectra are those of `archs.layers.spectral`, of norm "ortho". The unnormalised transform, "backward" in PyTorch and in
most published losses, is sqrt(h w) times larger, and so is its L1: what has weight 0.1 there has 12.8 here at 128x128.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from archs.layers.spectral import band_energies, hann, multiplicity, polar_bands, rfft2
from restore.action_distance import ActionLoss

# ---- pixels


class PixelLoss(nn.Module):
    """The mean or sum over all values of a function of the difference, which subclasses give."""

    def __init__(self, *, loss_weight: float = 1.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is neither 'mean' nor 'sum'")
        self.loss_weight, self.reduction = loss_weight, reduction

    def values(self, difference: Tensor) -> Tensor:
        """What is averaged or added up."""
        raise NotImplementedError

    def forward(self, restored: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        values = self.values(restored.float() - truth.float())
        return self.loss_weight * (values.sum() if self.reduction == "sum" else values.mean())


class CharbonnierLoss(PixelLoss):
    """sqrt(d^2 + eps^2): an L1 that is smooth at zero (Lai et al., CVPR 2017).

    STDAN's published recipe is ``reduction="sum"`` with eps = 1e-3; with Adam, sum and mean differ only through the
    optimiser's epsilon. For d well above eps the value is that of pixel L1.
    """

    def __init__(
        self, *, loss_weight: float = 1.0, reduction: Literal["mean", "sum"] = "mean", eps: float = 1e-3
    ) -> None:
        super().__init__(loss_weight=loss_weight, reduction=reduction)
        self.eps = eps

    def values(self, difference: Tensor) -> Tensor:
        """sqrt(d^2 + eps^2)."""
        return (difference.square() + self.eps**2).sqrt()


class L1Loss(PixelLoss):
    """|d|: pixel L1, the measure of the other losses' scales."""

    def values(self, difference: Tensor) -> Tensor:
        """|d|."""
        return difference.abs()


class MSELoss(PixelLoss):
    """d^2: for a white error s^2, which is 1.25 s times pixel L1."""

    def values(self, difference: Tensor) -> Tensor:
        """d^2."""
        return difference.square()


# ---- spectra


class FFTLoss(nn.Module):
    """Mean L1 of the difference of half spectra, beside a pixel loss: for the frequencies that this one neglects.

    ``kind`` is "modulus", mean |D|, or "reim", the mean of |Re D| and |Im D|. ``norm`` is PyTorch's: with "backward",
    as published, the value grows with the crop, with "ortho" it does not. Published with weight 0.1 and "backward":
    modulus in DSTNet (Pan et al., CVPR 2023), "reim" in MIMO-UNet (Cho et al., ICCV 2021), there of the full spectrum.

    Of a white error, against pixel L1: modulus 1.11, "reim" 0.71, with "backward" times sqrt(h w). At 128x128 and
    weight 0.1 this is 14.2 and 9.1: it dominates, so let it come in by ``ramp``, and log it apart.
    """

    def __init__(
        self,
        *,
        loss_weight: float = 0.1,
        norm: Literal["backward", "ortho"] = "backward",
        kind: Literal["modulus", "reim"] = "modulus",
    ) -> None:
        super().__init__()
        if norm not in ("backward", "ortho"):
            raise ValueError(f"norm={norm!r} is neither 'backward' nor 'ortho'")
        if kind not in ("modulus", "reim"):
            raise ValueError(f"kind={kind!r} is neither 'modulus' nor 'reim'")
        self.loss_weight, self.norm, self.kind = loss_weight, norm, kind

    def forward(self, restored: Float[Tensor, "*b h w"], truth: Float[Tensor, "*b h w"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        difference = rfft2(restored.float() - truth.float())  # linear: one transform for both
        values = difference.abs() if self.kind == "modulus" else torch.view_as_real(difference).abs()
        gain = sqrt(restored.shape[-2] * restored.shape[-1]) if self.norm == "backward" else 1.0
        return self.loss_weight * gain * values.mean()


class FocalFrequencyLoss(nn.Module):
    """Mean of w |D|^2 over the full spectrum: an MSE that cares most for what is worst (Jiang et al., ICCV 2021).

    The weight w is |D|^``alpha`` over its largest value in the plane (one colour of one frame), not differentiated;
    norm "ortho". With alpha = 0 it is `MSELoss`, exactly. The published options for patches,
    logarithms and averages over a batch are left out.

    For alpha = 1 a white error gives 0.43 s^2 at 128x128, less for larger pictures, which is 0.54 s times pixel L1: it
    fades with the square of the error and is 1% of pixel L1 at s = 0.02.
    """

    def __init__(self, *, loss_weight: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha={alpha} is negative: the worst frequencies would count least")
        self.loss_weight, self.alpha = loss_weight, alpha

    def forward(self, restored: Float[Tensor, "*b h w"], truth: Float[Tensor, "*b h w"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        height, width = restored.shape[-2:]
        difference = rfft2(restored.float() - truth.float())
        energy = torch.view_as_real(difference).square().sum(-1)
        focus = energy.detach().pow(self.alpha / 2)
        focus = focus / focus.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        total = (focus * energy * multiplicity(width, energy.device)).sum((-2, -1))
        return self.loss_weight * total.mean() / (height * width)


class SpectrumEnergyLoss(nn.Module):
    """L1 of log band energies, and half of their change from frame to frame: as sharp as the truth, as steadily.

    Mean |log E_k(p_t) - log E_k(g_t)| + 0.5 mean |D_t log E_k(p) - D_t log E_k(g)|, over frames t and bands k, with E_k
    the mean energy of all colours. Bands are hats over ``radial`` radii and ``angular`` directions. Our own, inspired
    by the loss for a "decent spectral distribution" of Zhu et al. (ICCV 2023), whose formula is not public: no
    reproduction. Blind to phase, so only beside a loss of pixels.

    Frames lose their mean and are tapered by a Hann window, since edges of a crop are no detail. Energies below the
    variance of rounding to 8 bits, ``floor``, count as none. Of one frame, the second term is 0.

    Its scale is that of contrast, not of error: it hardly sees noise and sees blur. Unweighted, on a 1/f texture of
    standard deviation 0.2 at 128x128, it is 2, 3.5 and 6.5 times pixel L1 for a white error of s = 0.01, 0.02 and
    0.05, but 42 and 62 times for a Gaussian blur of 0.5 and 1 px: with weight 0.01 about half of pixel L1.
    """

    def __init__(
        self, *, loss_weight: float = 0.01, radial: int = 8, angular: int = 1, floor: float = 1 / 12 / 255**2
    ) -> None:
        super().__init__()
        if radial < 1 or angular < 1 or floor <= 0:
            raise ValueError(f"radial={radial} and angular={angular} must be at least 1, floor={floor} above 0")
        self.loss_weight, self.radial, self.angular, self.floor = loss_weight, radial, angular, floor

    def forward(self, restored: Float[Tensor, "b t c h w"], truth: Float[Tensor, "b t c h w"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        difference = self._log_energies(restored) - self._log_energies(truth)  # (B, T, K)
        loss = difference.abs().mean()
        if difference.shape[1] > 1:
            loss = loss + 0.5 * difference.diff(dim=1).abs().mean()
        return self.loss_weight * loss

    def _log_energies(self, clip: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t k"]:
        height, width = clip.shape[-2:]
        clip = clip.float()
        taper = hann(height, width, clip.device)
        spectrum = rfft2((clip - clip.mean((-2, -1), keepdim=True)) * (taper / taper.square().mean().sqrt()))
        bands = polar_bands(height, width, self.radial, self.angular, clip.device)
        return (band_energies(spectrum, bands, width).mean(2) + self.floor).log()


# ---- from inside the network


class AuxiliaryLoss(nn.Module):
    """What the network says of its own forward pass: a regulariser, a distillation, a motion's photometric error.

    ``name`` is one of those that the network's `auxiliary_losses` gives, unweighted. The training loop takes the value
    from there instead of calling this with pictures. With find_unused_parameters, which looks at the output alone,
    every parameter behind the value must be behind the output, too.
    """

    def __init__(self, *, name: str, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.name, self.loss_weight = name, loss_weight

    def forward(self, offered: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The weighted loss, in float32; ValueError for a name that is not offered."""
        if self.name not in offered:
            names = ", ".join(offered) or "none"
            raise ValueError(f"AuxiliaryLoss name={self.name!r}: the network offers no such loss (it offers: {names})")
        return self.loss_weight * offered[self.name].float()


# ---- labels


class CrossEntropyLoss(nn.Module):
    """-log of the probability that a classifier gives the true class, the mean over clips.

    With ``label_smoothing`` s the target is 1 - s for the true class and s for all classes in equal parts (Szegedy et
    al., CVPR 2016).
    """

    def __init__(self, *, loss_weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and less than 1")
        self.loss_weight, self.label_smoothing = loss_weight, label_smoothing

    def forward(self, logits: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        return self.loss_weight * F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "CharbonnierLoss": CharbonnierLoss,
    "L1Loss": L1Loss,
    "MSELoss": MSELoss,
    "FFTLoss": FFTLoss,
    "FocalFrequencyLoss": FocalFrequencyLoss,
    "SpectrumEnergyLoss": SpectrumEnergyLoss,
    "ActionLoss": ActionLoss,
    "AuxiliaryLoss": AuxiliaryLoss,
}

LABEL_LOSSES: dict[str, Callable[..., nn.Module]] = {"CrossEntropyLoss": CrossEntropyLoss}  # of classifiers
