"""Weights of action backbones from a local file: their own, the published ones, or their image network's."""

import os
from pathlib import Path

from archs.action.atm_resnet import ATMResNet
from archs.action.inflate import Backbone, Inflated, inflate, spelling_of_video_weights
from restore.checkpoint import CheckpointError, load_state, read_state


def load_backbone(network: Backbone, path: str | os.PathLike[str]) -> Inflated | None:
    """Copy the weights of a `.pth` or safetensors file into ``network``, which its keys tell how to read.

    Weights of ``network`` itself, in our names or the published ones, have to be complete: None is returned. Those of
    its image network (see `archs.action.inflate`) are a start, and what came of them is returned. `CheckpointError`
    names the file and what does not fit. Nothing is downloaded.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; nothing is downloaded here, give the path of a local one")
    state = read_state(path)
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    spelling = spelling_of_video_weights(state)
    if spelling == "ours" or {key: tensor.shape for key, tensor in state.items()} == shapes:
        load_state(network, state, path)
        return None
    try:
        if spelling == "published" and not isinstance(network, ATMResNet):  # which has no published weights
            network.load_published(state)
            return None
        return inflate(network, state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
