"""Weights of classifiers of clips from a local file: their own, the published ones, or their image network's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from archs import CLASSIFIERS, ClipClassifier
from archs.action.inflate import Inflated, inflate, spelling_of_video_weights
from archs.layers.dtf import TAPS, DTFBlock
from restore.checkpoint import CheckpointError, build_network, load_state, read_info, read_state

NOWHERE = "no such file; nothing is downloaded here, give the path of a local one"
HEADS = ("fc.", "head.")  # keys of the last layer, ours and published


def load_backbone(network: ClipClassifier, path: str | os.PathLike[str]) -> Inflated | None:
    """Copy the weights of a `.pth` or safetensors file into ``network``, which its keys tell how to read.

    Weights of ``network`` itself, in our names or the published ones, have to be complete: None is returned. Those of
    its image network (see `archs.action.inflate`) are a start, and what came of them is returned. `CheckpointError`
    names the file and what does not fit. Nothing is downloaded.
    """
    return _load(network, _read(path), path)


def start_classifier(network: ClipClassifier, path: str | os.PathLike[str]) -> list[str]:
    """The same, to go on training from: the last layer stays fresh where the file's is for other classes.

    Returns the keys that stayed fresh. Weights for clips of another length are refused by name.
    """
    state = _read(path)
    _check_length(network, state, path)
    fresh = []
    for key, tensor in network.state_dict().items():
        names = [head + key.partition(".")[2] for head in HEADS] if key.startswith(HEADS) else []
        for name in (name for name in names if name in state and state[name].shape != tensor.shape):
            if _of_this_kind(network, state):
                state[name] = tensor
                fresh.append(key)
    inflated = _load(network, state, path)
    return fresh if inflated is None else list(inflated.fresh)


def load_classifier(
    path: str | os.PathLike[str], section: Mapping[str, Any] | None = None
) -> tuple[ClipClassifier, tuple[str, ...] | None]:
    """A trained classifier in eval mode and the names of its classes, where its file has them.

    A file that says of what network it is needs no ``section`` {type: ..., **constructor arguments}; for others it is
    built by that, and the weights have to be complete. `CheckpointError` for a file that does not fit.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: {NOWHERE}")
    if Path(path).suffix == ".safetensors" and (section is None or _says_what_it_is(path)):
        info = read_info(path)
        if info["network"]["type"] not in CLASSIFIERS:
            raise CheckpointError(f"{path}: holds {info['network']['type']}, which classifies nothing: it restores")
        network = build_network(info["network"], Path(path), CLASSIFIERS)
        load_state(network, read_state(path), path)
        names = info.get("classes")
        return network.eval(), tuple(names) if names else None
    if section is None:
        raise CheckpointError(f"{path}: does not say of what network it is; give network_g: {{type: dtf_net, ...}}")
    network = build_network(section, Path("network_g"), CLASSIFIERS)
    if load_backbone(network, path) is not None:
        raise CheckpointError(f"{path}: weights of images, which know no classes of actions; train from them first")
    return network.eval(), None


def _says_what_it_is(path: str | os.PathLike[str]) -> bool:
    try:
        read_info(path)
    except CheckpointError:
        return False
    return True


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: {NOWHERE}")
    return read_state(path)


def _load(network: ClipClassifier, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Inflated | None:
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    spelling = spelling_of_video_weights(state)
    if spelling == "ours" or {key: tensor.shape for key, tensor in state.items()} == shapes:
        load_state(network, state, path)
        return None
    try:
        if spelling == "published":
            network.load_published(state)
            return None
        return inflate(network, state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _of_this_kind(network: ClipClassifier, state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a video network; the classifiers of image networks are dropped anyway."""
    return spelling_of_video_weights(state) is not None or network.state_dict().keys() == state.keys()


def _check_length(network: ClipClassifier, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Filters over time have a weight for every frame: another length is said as such, not as a list of shapes."""
    for name, block in network.named_modules():
        if not isinstance(block, DTFBlock):
            continue
        for key in (f"{name}.predictor.weight", f"{name.removesuffix('dtf')}dtf_blk.filter_g.weight",
                    f"{name.removesuffix('dtf')}dtf_block.filter_g.weight"):  # fmt: skip
            if key not in state or state[key].ndim != 4 or state[key].shape[1] % (block.dim + len(TAPS)):
                continue
            found = state[key].shape[1] // (block.dim + len(TAPS)) * network.frames_multiple_of
            if found != network.clip_length:
                raise CheckpointError(
                    f"{path}: weights for clips of {found} frames, but network_g.clip_length is {network.clip_length}: "
                    f"set network_g.clip_length: {found} and num_frame: {found} or more"
                )
