"""Training losses; `LOSSES` is the one table from a name in an options file to its class."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn


class CharbonnierLoss(nn.Module):
    """sqrt(d^2 + eps^2): an L1 that is smooth at zero (Lai et al., CVPR 2017).

    STDAN's published recipe is ``reduction="sum"`` with eps = 1e-3; with Adam, sum and mean differ only through the
    optimiser's epsilon. For d well above eps the value is that of pixel L1.
    """

    def __init__(
        self, *, loss_weight: float = 1.0, reduction: Literal["mean", "sum"] = "mean", eps: float = 1e-3
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is neither 'mean' nor 'sum'")
        self.loss_weight, self.reduction, self.eps = loss_weight, reduction, eps

    def forward(self, restored: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """The weighted loss, in float32."""
        values = ((restored.float() - truth).square() + self.eps**2).sqrt()
        return self.loss_weight * (values.sum() if self.reduction == "sum" else values.mean())


LOSSES: dict[str, Callable[..., nn.Module]] = {"CharbonnierLoss": CharbonnierLoss}
