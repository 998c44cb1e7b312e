"""Training with the truth as an input: a teacher that sees it, then a student that learns the teacher's features.

    train.privileged: {role: teacher}                         writes models/teacher_<n>.safetensors, too
    train.privileged: {role: student, teacher: <that file>}   starts from the teacher's weights

What is trained is then a network around the network, with what training adds to it; validated, averaged for use and
written as models/net_g_<n>.safetensors is the network within, which knows nothing of it. The parts, their source and
what is our own are in `archs.layers.privileged`. Any network will do whose ``encoder``, ``aggregate`` and ``decoder``
are submodules, each called once a pass: the truth enters after the first, features are compared after the others.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from archs import ARCHS, VideoNet
from archs.layers.privileged import FeatureDistillation, FeatureListener, PrivilegedFeatures
from restore.checkpoint import CheckpointError, build_network, find_weights, load_state, read_info, save_network
from restore.options import OptionError, PrivilegedOptions

SHOWN, TAUGHT = "encoder", ("aggregate", "decoder")


class _Around(VideoNet):
    """A network around ``network``, of which it can hear the features: like it in all that the loop asks for."""

    def __init__(self, network: VideoNet) -> None:
        super().__init__()
        self.network = network
        self.scale, self.time_scale = network.scale, network.time_scale
        self.multiple_of, self.min_frames = network.multiple_of, network.min_frames
        self.features = FeatureListener(network, (SHOWN, *TAUGHT))
        self.channels = {part: features.shape[1] for part, features in self._probe().items()}

    def heavy_modules(self) -> list[nn.Module]:
        """Those of the network."""
        return self.network.heavy_modules()

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Those of the network."""
        return self.network.auxiliary_losses()

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        """The features of a small black clip."""
        training, side = self.network.training, self.multiple_of * max(1, 16 // self.multiple_of)
        weight = next(self.network.parameters())
        self.features.listen()
        self.network.eval()(weight.new_zeros(1, self.min_frames, 3, side, side))
        self.network.train(training)
        return self.features.stop()


class PrivilegedTeacher(_Around):
    """A network that sees the truth of its input frames; without a truth it is the network alone.

    ValueError for networks without the parts that this needs.
    """

    def __init__(self, network: VideoNet, *, bottleneck: int = 4, noise: float = 0.1) -> None:
        super().__init__(network)
        self.privileged = PrivilegedFeatures(self.channels[SHOWN], self.scale, bottleneck=bottleneck, noise=noise)
        self._shown: Tensor | None = None
        network.get_submodule(SHOWN).register_forward_hook(self._add)

    def forward(
        self, clip: Float[Tensor, "b t 3 h w"], truth: Float[Tensor, "b u 3 H W"] | None = None
    ) -> Float[Tensor, "b u 3 H W"]:
        """``truth`` is what should come out; of it, the frames at the input's times are seen."""
        if truth is not None:
            self._shown = self.privileged(truth[:, :: self.time_scale].flatten(0, 1))
        restored = self.network(clip)
        self._shown = None
        return restored

    def _add(self, module: nn.Module, inputs: object, features: Tensor) -> Tensor:
        return features if self._shown is None else features + self._shown.view_as(features)


class PrivilegedStudent(_Around):
    """A network that learns to tell what its teacher's features are; with a truth, which only the teacher sees.

    `auxiliary_losses` has the distillation as "privileged". ValueError where the two restore different things.
    """

    def __init__(self, network: VideoNet, teacher: PrivilegedTeacher) -> None:
        super().__init__(network)
        ours, theirs = ((one.scale, one.time_scale) for one in (network, teacher))
        if ours != theirs:
            raise ValueError(f"the teacher has scale and time_scale {theirs}, the student {ours}: they must be equal")
        self.distillation = FeatureDistillation({part: self.channels[part] for part in TAUGHT}, teacher.channels)
        self.teacher = teacher.requires_grad_(False).eval()
        self._loss: Tensor | None = None

    def train(self, mode: bool = True) -> "PrivilegedStudent":
        """Training mode for all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, clip: Float[Tensor, "b t 3 h w"], truth: Float[Tensor, "b u 3 H W"] | None = None
    ) -> Float[Tensor, "b u 3 H W"]:
        """What the network restores, with or without ``truth``."""
        if truth is None:
            return self.network(clip)
        self.teacher.features.listen()
        with torch.no_grad():
            self.teacher(clip, truth)
        self.features.listen()
        restored = self.network(clip)
        self._loss = self.distillation(self.features.stop(), self.teacher.features.stop())
        return restored

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Those of the network, and the distillation of the last pass with a truth."""
        own = {} if self._loss is None else {"privileged": self._loss}
        return {**self.network.auxiliary_losses(), **own}


def with_privilege(network: VideoNet, options: PrivilegedOptions | None, *, pretrained: bool) -> VideoNet:
    """What to train for ``network``: itself, or the teacher or student around it that the options ask for.

    A student that is not ``pretrained`` starts from its teacher's weights. `OptionError` where something does not fit.
    """
    if options is None:
        return network
    try:
        if options.role == "teacher":
            return PrivilegedTeacher(network, bottleneck=options.bottleneck, noise=options.noise)
        assert options.teacher is not None
        teacher = load_teacher(options.teacher)
        if not pretrained:
            load_state(network, teacher.network.state_dict(), options.teacher)
        return PrivilegedStudent(network, teacher)
    except ValueError as error:
        raise OptionError(f"train.privileged: {error}") from error


def shipped(network: nn.Module) -> nn.Module:
    """The network to validate and use, without what training has put around it."""
    return network.network if isinstance(network, _Around) else network


def save_teacher(path: Path, teacher: PrivilegedTeacher, description: Mapping[str, Any], **info: Any) -> None:
    """A file for `load_teacher`; ``description`` is the network's, as for `restore.checkpoint.save_network`."""
    path_through = {"bottleneck": teacher.privileged.narrow.out_channels, "noise": teacher.privileged.noise}
    save_network(path, teacher, description, privileged=path_through, **info)


def load_teacher(name_or_path: str | os.PathLike[str]) -> PrivilegedTeacher:
    """The teacher in a file of `save_teacher`; `CheckpointError` for a file that is none."""
    path = find_weights(name_or_path)
    info = read_info(path)
    if "privileged" not in info:
        raise CheckpointError(f"{path}: not a teacher; a run with role: teacher writes models/teacher_<n>.safetensors")
    teacher = PrivilegedTeacher(build_network(info["network"], path, ARCHS), **info["privileged"])
    load_state(teacher, safetensors.torch.load_file(path), path)
    return teacher
