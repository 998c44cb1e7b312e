"""The modulated deformable convolution by operators of other packages, where a user has them: torchvision's, mmcv's.

Both take offsets from the regular taps, (dy, dx) interleaved for group and tap, tap = 3 row + column; ours are from the
pixel. Both are float32 here: neither knows bfloat16 on every device.
"""

import torch
from torch import Tensor

from archs.layers.deform_torch import tap_grid


def convolve_torchvision(x: Tensor, displacement: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By `torchvision.ops.deform_conv2d`.

    x (B, C, H, W), displacement (B, G, 9, 2, H, W) from the pixel, modulation (B, G, 9, H, W), weight (D, C, 3, 3);
    (B, D, H, W) float32.
    """
    from torchvision.ops import deform_conv2d

    offset, mask = _layout(displacement, modulation)
    return deform_conv2d(x.float(), offset, weight.float(), bias.float(), padding=1, mask=mask)


def convolve_mmcv(x: Tensor, displacement: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By `mmcv.ops.modulated_deform_conv2d`; the tensors as for torchvision's."""
    from mmcv.ops import modulated_deform_conv2d

    offset, mask = _layout(displacement, modulation)
    groups = displacement.shape[1]  # it is an autograd function's `apply`, which takes no keywords:
    #       stride, padding, dilation, groups of the convolution, groups of offsets
    return modulated_deform_conv2d(
        x.float().contiguous(), offset, mask, weight.float().contiguous(), bias.float(), 1, 1, 1, 1, groups
    )


def _layout(displacement: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (B, G*9*2, H, W) and mask (B, G*9, H, W), dense."""
    offset = displacement - tap_grid(3, displacement)[:, :, None, None]
    return offset.flatten(1, 3).contiguous(), modulation.flatten(1, 2).contiguous()


def missing_torchvision(kind: str) -> str:
    """Why torchvision's operator cannot be used, "" if it can."""
    try:
        from torchvision.ops import deform_conv2d  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a wheel for another torch fails in many ways
        return f"torchvision cannot be imported ({_first_line(error)})"
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        return "torchvision has no compiled operators that fit this torch"
    return ""


def missing_mmcv(kind: str) -> str:
    """Why mmcv's operator cannot be used, "" if it can."""
    try:
        from mmcv.ops import modulated_deform_conv2d  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"mmcv with its operators cannot be imported ({_first_line(error)})"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
