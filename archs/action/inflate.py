"""Weights of image networks as the start of the action backbones: ResNet, Swin and CLIP from state_dicts one has.

- DTFNet and ATMResNet from a ResNet-50 or -101 in torchvision's names, which are timm's.
- DTFTransformer from a Swin S, B or L in Microsoft's names or timm's. Its norm after the patch embedding is dropped,
  as DTF-Transformer has none: the start is that of the published code, not the image network itself.
- ATMCLIP from CLIP's vision transformer in OpenAI's names, which are open_clip's, with the text tower or without, or
  in timm's. Names do not tell activations: take weights trained with QuickGELU, as OpenAI's are.

2D kernels get an axis of time. A layer that takes four frames for one has the kernel at the third, index 2, and zeros
elsewhere: published for the stem of DTF-Net; for the patch embedding of DTF-Transformer our reconstruction by the same
rule. So a fresh network sees in every group of four what its image network sees in the third frame. ATM starts as a
ReLU, ATM-CLIP's shifts mix the class tokens of neighbouring frames from the start.

Classifiers of images are dropped, whatever their size, as in the published code. Names and shapes are those of the
published files (published). That features equal the image network's is measured with random weights, for a ResNet
against torchvision's; with the published files themselves nothing is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from archs.action import atm_clip, dtf_net, dtf_transformer
from archs.action.atm_clip import ATMCLIP, resized_positions
from archs.action.atm_resnet import ATMResNet
from archs.action.dtf_net import DTFNet
from archs.action.dtf_transformer import DTFTransformer
from archs.contract import ClipClassifier


@dataclass(frozen=True)
class Inflated:
    """What `inflate` did, in keys of the network, but for ``dropped``, which are the file's."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # of the loaded, positions of another grid
    fresh: tuple[str, ...]  # as they were: what image networks lack, classifiers, and counters of old files
    dropped: tuple[str, ...]  # what a file of this kind holds and no backbone uses


def inflate(network: ClipClassifier, state: Mapping[str, Any]) -> Inflated:
    """Copy a state_dict of ``network``'s image network into it; what that lacks keeps its values.

    {"model": state}, {"state_dict": state}, {"module": state} and "module." before the keys are unwrapped. Positions
    of CLIP for another grid are resized, bicubic, from square grids only; Swin's bias tables of another window are
    refused, and so is all else that does not fit: ValueError names the first keys, and ``network`` is as before.
    """
    source = _source(network)
    state = _unwrapped(state)
    if spelling_of_video_weights(state):
        raise ValueError(
            f"{_first([key for key in state if _VIDEO.search(key)])}: weights of a video network, not of an image "
            "network; use load_published for the published names, load_state_dict for ours"
        )
    found = source.translate(state)
    ours = {key: tensor.shape for key, tensor in network.state_dict().items()}
    expected = {source.name_of(key): key for key in ours if not _LACKING.search(key)}
    dropped = [key for key, (name, _) in found.items() if name not in expected and source.beyond.match(name)]
    problems = _problems({key: named for key, named in found.items() if key not in dropped}, expected, ours)
    if problems:
        raise ValueError(f"not the weights of {source.network} like this network's: {problems}; {source.way_out}")
    weights = {expected[name]: tensor for name, tensor in found.values() if name in expected}
    fitted = {key: _fitted(key, tensor, ours[key]) for key, tensor in weights.items()}
    network.load_state_dict(fitted, strict=False)
    resized = [key for key, tensor in weights.items() if key == "position" and tensor.shape != ours[key]]
    fresh = [key for key in ours if key not in fitted]
    return Inflated(tuple(fitted), tuple(resized), tuple(fresh), tuple(dropped))


def inflated_kernel(kernel: Float[Tensor, "o i h w"], frames: int) -> Float[Tensor, "o i {frames} h w"]:
    """(O, I, h, w) -> (O, I, frames, h, w): the kernel at index frames // 2, zeros at the others."""
    inflated = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    inflated[:, :, frames // 2] = kernel
    return inflated


def spelling_of_video_weights(keys: Iterable[str]) -> Literal["ours", "published"] | None:
    """In whose names ``keys`` hold filters over time, ATM or shifts; None if they hold none, as image networks."""
    match = next(filter(None, map(_VIDEO.search, keys)), None)
    return match and ("ours" if match["ours"] else "published")


# ---- names: of the parts that image networks lack, and of the image networks' own

_VIDEO = re.compile(r"(?:^|\.)(?:(?P<ours>dtf|atm|shift[12])|dtf_blk|dtf_block|control_point[12c])\.")
_LACKING = re.compile(rf"{_VIDEO.pattern}|^(?:fc|head)\.")
_OPTIONAL = re.compile(r"num_batches_tracked$|^project$")  # from before PyTorch 0.4.1; files without a head

Named = dict[str, tuple[str, Tensor]]  # key in the file -> name in its first program, weight in the shape of that
Table = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]  # beginning of a key, what stands there instead

_TIMM_SWIN: Table = (
    (r"layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
    (r"head\.fc\.", "head."),
)
_TIMM_CLIP: Table = (
    (r"cls_token$", "visual.class_embedding"),
    (r"pos_embed$", "visual.positional_embedding"),
    (r"patch_embed\.proj\.", "visual.conv1."),
    (r"norm_pre\.", "visual.ln_pre."),
    (r"norm\.", "visual.ln_post."),
    (r"blocks\.(\d+)\.norm([12])\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"visual.transformer.resblocks.\1.attn.in_proj_"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"visual.transformer.resblocks.\1.attn.out_proj."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
)
_TIMM_CLIP_HEAD: Table = ((r"head\.weight$", "visual.proj"),)
_TIMM_CLIP_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "visual.class_embedding": lambda tensor: tensor.squeeze(),  # (1, 1, C)
    "visual.positional_embedding": lambda tensor: tensor.squeeze(0),  # (1, 1 + N, C)
    "visual.proj": lambda tensor: tensor.swapaxes(0, -1),
}


def from_torchvision(state: Mapping[str, Tensor]) -> Named:
    """ResNets: torchvision's names are timm's."""
    return {key: (key, tensor) for key, tensor in state.items()}


def from_swin(state: Mapping[str, Tensor]) -> Named:
    """Microsoft's names, or timm's, where patches merge at the start of the next stage, never of the first."""
    if any(key.startswith("layers.0.downsample.") for key in state):
        return {key: (key, tensor) for key, tensor in state.items()}
    return {key: (_renamed(key, _TIMM_SWIN), tensor) for key, tensor in state.items()}


def from_clip(state: Mapping[str, Tensor]) -> Named:
    """OpenAI's names, those of the image tower alone, or timm's.

    timm's head is the projection, unless its bias says that it is a classifier, fine-tuned.
    """
    if any(key.startswith("visual.") for key in state):
        return {key: (key, tensor) for key, tensor in state.items()}
    if "cls_token" not in state:
        return {key: (f"visual.{key}", tensor) for key, tensor in state.items()}
    projects = "head.bias" not in state or not state["head.bias"].any()
    table = (*_TIMM_CLIP, *_TIMM_CLIP_HEAD) if projects else _TIMM_CLIP
    found = {}
    for key, tensor in state.items():
        name = _renamed(key, table)
        reshape = _TIMM_CLIP_SHAPES.get(name)
        found[key] = (name, reshape(tensor) if reshape else tensor)
    return found


def _renamed(key: str, table: Table) -> str:
    for beginning, replacement in table:
        renamed, count = re.subn("^" + beginning, replacement, key)
        if count:
            return renamed
    return key


@dataclass(frozen=True)
class _Source:
    """The image network of a backbone."""

    network: str
    way_out: str
    translate: Callable[[Mapping[str, Tensor]], Named]
    name_of: Callable[[str], str]  # our key -> its name
    beyond: re.Pattern[str]  # names that no backbone uses


_RESNET = _Source(
    "a ResNet",
    "its names are torchvision's, and depth, blocks and width must be the file's",
    from_torchvision,
    dtf_net.published_key,
    re.compile(r"fc\."),
)
_SWIN = _Source(
    "a Swin Transformer",
    "its names are Microsoft's or timm's, and size, depths, heads and window must be the file's (tables of "
    "(2 * window - 1)^2 rows are not resized)",
    from_swin,
    dtf_transformer.published_key,
    re.compile(r"head\.|patch_embed\.norm\.|.*\.(relative_position_index|attn_mask)$"),
)
_CLIP = _Source(
    "CLIP's vision transformer",
    "its names are OpenAI's or timm's, and patch, width, depth and projected must be the file's (positions are resized "
    "from square grids only)",
    from_clip,
    atm_clip.published_key,
    re.compile(
        r"(head|text|transformer|token_embedding|ln_final)\.|(positional_embedding|text_projection|logit_scale|"
        r"logit_bias|input_resolution|context_length|vocab_size)$"
    ),
)
_SOURCES: dict[type[ClipClassifier], _Source] = {
    DTFNet: _RESNET,
    ATMResNet: _RESNET,
    DTFTransformer: _SWIN,
    ATMCLIP: _CLIP,
}


def _source(network: ClipClassifier) -> _Source:
    for kind, source in _SOURCES.items():
        if isinstance(network, kind):
            return source
    known = ", ".join(kind.__name__ for kind in _SOURCES)
    raise ValueError(f"{type(network).__name__} has no image network; those that start from one are {known}")


# ---- what fits


def _problems(found: Named, expected: Mapping[str, str], ours: Mapping[str, torch.Size]) -> str:
    """The first keys of all that does not fit, "" if all does."""
    given = {name for name, _ in found.values()}
    lists = {
        "missing": [name for name, key in expected.items() if name not in given and not _OPTIONAL.search(key)],
        "unknown": [key for key, (name, _) in found.items() if name not in expected],
        "of another shape": [
            f"{key} {tuple(tensor.shape)} instead of {tuple(_image_shape(ours[expected[name]]))}"
            for key, (name, tensor) in found.items()
            if name in expected and not _fits(expected[name], tensor.shape, ours[expected[name]])
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in lists.items() if keys)


def _image_shape(shape: torch.Size) -> torch.Size:
    """Ours without the axis of time."""
    return torch.Size([*shape[:2], *shape[3:]]) if len(shape) == 5 else shape


def _fits(key: str, given: torch.Size, ours: torch.Size) -> bool:
    if key == "position" and len(given) == 2 and given[0] > 1:
        side = round((given[0] - 1) ** 0.5)
        return given[0] == 1 + side**2 and given[1] == ours[1]
    return given == _image_shape(ours)


def _fitted(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if key == "position":
        side = round((shape[0] - 1) ** 0.5)
        return resized_positions(tensor, (side, side))
    return inflated_kernel(tensor, shape[2]) if len(shape) == 5 else tensor


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in ("model", "state_dict", "module"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("holds no state_dict of tensors; give one, bare or under model, state_dict or module")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
