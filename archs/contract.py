"""What every network of `archs.ARCHS`, and every classifier of `archs.CLASSIFIERS`, takes, gives and declares."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

Init = TypeVar("Init", bound=Callable[..., None])


class VideoNet(nn.Module):
    """A network that restores clips: float RGB in [0, 1], (B, T, 3, h, w) -> (B, U, 3, scale*h, scale*w).

    Subclasses set the four attributes, take plain keyword arguments and implement `forward`. The streamer
    (`restore.stream`) obeys them: it pads sizes, cuts windows and undoes both.
    """

    scale: int = 1  # H = scale * h
    time_scale: int = 1  # U = (T - 1) * time_scale + 1
    multiple_of: int = 1  # h and w must divide by it
    min_frames: int = 1  # least T
    added: tuple[str, ...] = ()  # parts, by the start of their keys, that weights to start training from may lack

    def frames_out(self, frames_in: int) -> int:
        """How many frames come out of ``frames_in``."""
        return (frames_in - 1) * self.time_scale + 1

    def heavy_modules(self) -> list[nn.Module]:
        """Parts whose activations are worth computing twice to save memory in training."""
        return list(self.children())

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """What the last forward pass in training mode wants minimised beside the pictures: unweighted scalars by name.

        For `restore.losses.AuxiliaryLoss`. A network that has any assigns each to an attribute when `forward` runs in
        training mode, and gives them here. Assigned, not appended, so that passes which are recomputed leave one value;
        an attribute of the network itself, so that it is found however the network is wrapped or compiled.
        """
        return {}

    def check_clip(self, clip: Float[Tensor, "b t 3 h w"]) -> None:
        """Raise ValueError, naming the rule, for a clip this network cannot take."""
        frames, channels, height, width = clip.shape[1:]
        name = type(self).__name__
        if channels != 3:
            raise ValueError(f"{name} takes RGB clips (B, T, 3, h, w), not {tuple(clip.shape)}")
        if frames < self.min_frames:
            raise ValueError(f"{name} needs at least {self.min_frames} frames, not {frames}")
        if height % self.multiple_of or width % self.multiple_of:
            raise ValueError(
                f"{name} needs height and width divisible by {self.multiple_of}, not {height}x{width}; "
                "restore.stream pads and crops by itself"
            )


class ClipClassifier(nn.Module):
    """A network that classifies clips: float RGB in [0, 1], (B, T, 3, h, w) -> logits (B, classes).

    Subclasses set what they declare, take plain keyword arguments and implement `forward` and `features`.
    """

    classes: int
    clip_length: int | None = None  # T that the weights are made for; None: they do not depend on it
    frames_multiple_of: int = 1  # T must divide by it
    multiple_of: int = 1  # h and w must divide by it

    def features(self, clip: Float[Tensor, "b t 3 h w"]) -> list[Tensor]:
        """Maps of the stages, each (B, T', C, h', w')."""
        raise NotImplementedError

    def load_published(self, state: Mapping[str, Any]) -> None:
        """Copy weights under published names; ValueError where they do not fit or, as here, there are none."""
        raise ValueError(
            f"weights of a video network, but {type(self).__name__} has no published ones; load its own, or those of "
            "its image network"
        )

    def check_clips(self, frames: int, size: int) -> None:
        """Raise ValueError, naming rule and way out, for clips of ``frames`` x ``size`` x ``size``.

        The filters of DTF would mirror clips that are shorter than their weights are for; what that costs nobody has
        measured, so it is refused where a network is trained or scored.
        """
        name = type(self).__name__
        if self.clip_length is not None and frames < self.clip_length:
            raise ValueError(
                f"{frames} frames, but the weights of {name} are for clips of {self.clip_length}: set num_frame: "
                f"{self.clip_length}, or train a network of clip_length: {frames}"
            )
        if frames % self.frames_multiple_of:
            raise ValueError(f"{frames} frames: {name} needs a multiple of {self.frames_multiple_of}")
        if size % self.multiple_of:
            raise ValueError(f"frames of {size}x{size}: {name} needs sides that are multiples of {self.multiple_of}")


def and_keywords_of(base: type[nn.Module], without: Sequence[str] = ()) -> Callable[[Init], Init]:
    """For a constructor whose last parameter ``**others`` goes to ``base``: its signature shows the keywords of base.

    But for those ``without``, which the constructor gives itself. Options files and their schema know what a network
    takes from its signature.
    """

    def shown(init: Init) -> Init:
        *mine, others = inspect.signature(init).parameters.values()
        assert others.kind is inspect.Parameter.VAR_KEYWORD
        names = {*(parameter.name for parameter in mine), *without}
        theirs = [p for p in inspect.signature(base.__init__).parameters.values() if p.name not in names]
        init.__signature__ = inspect.Signature([*mine, *theirs])  # type: ignore[attr-defined]
        init.__annotations__ = {**base.__init__.__annotations__, **init.__annotations__}
        return init

    return shown
