"""Action blocks between the frames of a restoration network: a filter over time, arithmetic between frames.

Networks that recognise actions let frames meet in blocks of which trained weights know the length of the clip and
statistics of large batches. These are the same blocks (`archs.layers.dtf`, `archs.layers.atm`) in the form that
restoration needs: any number of frames, any size, batches of one, the identity at the start. No published network has
them in this place; the choices below are our own and reproduce nothing.
"""

from math import gcd

from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.atm import ATMBranch, Operation
from archs.layers.dtf import DTFBlock
from archs.layers.spectral import reflect_pad

RADIUS = 2  # frames, of DTF: the nearest of the same kind where every second one is interpolated
HIDDEN = 32  # channels, of ATM


class TemporalDTF(nn.Module):
    """Dynamic temporal filtering of a sequence, after Long et al. (ECCV 2022, "DTF"): taps predicted per location.

    Filters of five frames shared by 16 channels, from features that aggregate both neighbours in time; divided by their
    root mean square at each location instead of a batch's. The clip is mirrored by two frames at both ends, since time
    is circular in the Fourier transform: taps that reach beyond the first frame would meet the last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.filter = DTFBlock(
            channels, 2 * RADIUS + 1, groups=gcd(channels, 16), sharing="paper", predictor="taps", norm="gn",
            radius=RADIUS, bidirectional=True,
        )  # fmt: skip

    def forward(self, sequence: Float[Tensor, "b u c h w"]) -> Float[Tensor, "b u c h w"]:
        """The filtered sequence; any U, h and w."""
        frames = sequence.transpose(1, 2)  # (B, C, U, h, w)
        mirrored = reflect_pad(frames.flatten(3), (RADIUS, RADIUS), (0, 0)).unflatten(3, frames.shape[3:])
        return self.filter(mirrored)[:, :, RADIUS:-RADIUS].transpose(1, 2)


class TemporalATM(nn.Sequential):
    """Arithmetic between the frames of a sequence, after Wu et al. (ICCV 2023, "ATM"): product, then difference.

    (B, U, C, h, w) -> the same shape; any U, h and w. The two operations of the released program, in its order, on
    every second pixel, narrow, with the frames before and after; the first and last stand for what is beyond them.
    Correlations are read by 1x1 convolutions, and norms have the statistics of single maps.
    """

    def __init__(self, channels: int) -> None:
        operations: tuple[Operation, ...] = ("mul", "sub")
        super().__init__(*(
            ATMBranch(
                channels, operation=operation, hidden=HIDDEN, context=3, stride=2, final_relu=False, ends="replicate",
                resize="bilinear", norm="group", pointwise=True,
            )
            for operation in operations
        ))  # fmt: skip


TEMPORAL: dict[str, type[TemporalDTF] | type[TemporalATM]] = {"dtf": TemporalDTF, "atm": TemporalATM}


def temporal_block(name: str, channels: int) -> TemporalDTF | TemporalATM:
    """The block of `TEMPORAL` for sequences of ``channels``; ValueError for another name."""
    if name not in TEMPORAL:
        raise ValueError(f"temporal={name!r} is none of null, {', '.join(TEMPORAL)}")
    return TEMPORAL[name](channels)
