"""Pictures as channels of DCT coefficients, the input of "Learning in the Frequency Domain" (Xu et al., CVPR 2020).

RGB -> YCbCr as in JPEG -> 8x8 blocks -> orthonormal DCT -> one channel per coefficient, 64 of Y, 64 of Cb, 64 of Cr,
row-major in vertical frequency u and horizontal v: channel 64 plane + 8 u + v. One pixel of the result is one block.

Departs from the paper: coefficients are computed, not read from a JPEG file of quality 100 with halved chroma, so they
are not rounded (by at most 0.5 each) and all three planes have one size; pictures of any size, reflected at the bottom
and right. The paper keeps low frequencies, which is right for classification and wrong for restoration, whose subject
are the high ones: a condition or an input from the compressed domain, never the way of the pixels.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs.layers.spectral import block_dct, block_idct, pad_to_multiple

RED, BLUE = 0.299, 0.114  # shares of luma, ITU-R BT.601 and JFIF (ITU-T T.871, section 7)

# Statistics of ImageNet, coefficients on the scale 0..255 shifted by -128. Published per channel with the authors' code
# (DCTNet); ours: the mean coefficients (u = v = 0) as published, other means (all < 1.3) taken as 0, other deviations
# as the law of natural images a / (u + v), which meets each of the 189 published ones within a factor of 0.8 to 1.34.
DC_MEAN = (-87.8, -58.4, 32.0)
DC_STD = (416.3, 79.1, 74.2)
AC_STD = (80.0, 18.0, 16.5)  # a of Y, Cb, Cr

# Coefficients that the published static selections keep, as the lengths v < n of the rows u = 0, 1, ...: Y, then both
# chroma planes. From the lists in the authors' code, the same for classification and detection.
SUBSETS = {
    24: ((4, 4, 4, 4), (2, 2)),
    32: ((5, 5, 5, 4, 3), (3, 2)),
    48: ((6, 6, 6, 6, 4, 4), (3, 3, 2)),
    64: ((7, 7, 6, 6, 6, 6, 6), (3, 3, 2, 2)),
}


def rgb_to_ycbcr(x: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """RGB in [0, 1] -> full-range YCbCr of JPEG, 0..255 shifted by -128: grey has 0, 0, 0.

    Y = 255 (0.299 R + 0.587 G + 0.114 B) - 128, Cb = 255 (B - luma) / 1.772, Cr = 255 (R - luma) / 1.402: ITU-R BT.601
    as in JFIF (ITU-T T.871, section 7), unrounded. Not the luma 16..235 of the metrics. ValueError: no three channels.
    """
    if x.ndim < 3 or x.shape[-3] != 3:
        raise ValueError(f"expected RGB pictures (..., 3, height, width), got {tuple(x.shape)}")
    red, green, blue = (255 * x).unbind(-3)
    luma = RED * red + (1 - RED - BLUE) * green + BLUE * blue
    return torch.stack([luma - 128, (blue - luma) / (2 - 2 * BLUE), (red - luma) / (2 - 2 * RED)], -3)


def ycbcr_to_rgb(x: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """The inverse of `rgb_to_ycbcr`, not clipped."""
    luma, cb, cr = x.unbind(-3)
    luma = luma + 128
    blue, red = luma + (2 - 2 * BLUE) * cb, luma + (2 - 2 * RED) * cr
    green = (luma - RED * red - BLUE * blue) / (1 - RED - BLUE)
    return torch.stack([red, green, blue], -3) / 255


def static_subset(count: int) -> list[int]:
    """Which of the 192 channels a published selection of 24, 32, 48 or 64 keeps, in order of Y, Cb, Cr.

    Y/Cb/Cr counts 16+4+4, 22+5+5, 32+8+8, 44+10+10, all low frequencies; 192 is all of them. ValueError otherwise.
    """
    if count == 192:
        return list(range(192))
    if count not in SUBSETS:
        raise ValueError(f"{count} DCT coefficients: published selections have {', '.join(map(str, SUBSETS))} or 192")
    luma, chroma = SUBSETS[count]
    planes = enumerate((luma, chroma, chroma))
    rows = ((64 * plane + 8 * u, length) for plane, lengths in planes for u, length in enumerate(lengths))
    return list(chain.from_iterable(range(start, start + length) for start, length in rows))


class DCTInput(nn.Module):
    """RGB in [0, 1] (B, 3, h, w) -> DCT coefficients (B, 192, ceil(h/8), ceil(w/8)), and back.

    ``normalise="imagenet"`` subtracts and divides by what `DC_MEAN` and the constants beside it state, so that 98% of
    the values lie within -3..3 (measured on real video); "none" leaves coefficients as JPEG has them (a flat 200 gives
    576 in the mean of Y). ``affine`` adds a learnt gain and shift per channel on top. Computed in float32, the dtype of
    the picture out.
    """

    def __init__(self, *, normalise: Literal["imagenet", "none"] = "imagenet", affine: bool = False) -> None:
        super().__init__()
        if normalise not in ("imagenet", "none"):
            raise ValueError(f"normalise={normalise!r} is neither 'imagenet' nor 'none'")
        mean, std = _statistics() if normalise == "imagenet" else (torch.zeros(192), torch.ones(192))
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.gain = nn.Parameter(torch.ones(192, 1, 1)) if affine else None
        self.shift = nn.Parameter(torch.zeros(192, 1, 1)) if affine else None

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 192 (h+7)//8 (w+7)//8"]:
        """Blocks start at the top left pixel; incomplete ones are filled by reflection."""
        planes = pad_to_multiple(rgb_to_ycbcr(x.float()), 8)
        values = (block_dct(planes) - self.mean) / self.std
        if self.gain is not None and self.shift is not None:
            values = self.gain * values + self.shift
        return values.to(x.dtype)

    def inverse(
        self, coefficients: Float[Tensor, "b 192 rows columns"], size: Sequence[int]
    ) -> Float[Tensor, "b 3 {size[0]} {size[1]}"]:
        """The picture of ``size`` (h, w) that has these coefficients, not clipped.

        Exact but for rounding; a learnt gain must not be 0. ValueError where the size has another number of blocks.
        """
        blocks = [-(-length // 8) for length in size]
        if blocks != list(coefficients.shape[-2:]):
            found = "x".join(map(str, coefficients.shape[-2:]))
            raise ValueError(f"{found} blocks, but a picture of {size[0]}x{size[1]} px has {blocks[0]}x{blocks[1]}")
        values = coefficients.float()
        if self.gain is not None and self.shift is not None:
            values = (values - self.shift) / self.gain
        planes = block_idct(values * self.std + self.mean)
        return ycbcr_to_rgb(planes)[..., : size[0], : size[1]].to(coefficients.dtype)


def _statistics() -> tuple[Float[Tensor, "192"], Float[Tensor, "192"]]:
    """Mean and standard deviation of every channel on ImageNet."""
    k = torch.arange(8)
    total = (k[:, None] + k).flatten()  # u + v
    mean = torch.where(total == 0, torch.tensor(DC_MEAN)[:, None], 0.0)
    std = torch.where(total == 0, torch.tensor(DC_STD)[:, None], torch.tensor(AC_STD)[:, None] / total.clamp_min(1))
    return mean.flatten(), std.flatten()
