"""Data sets of labelled clips by name: `ACTION_SETS` to train classifiers, `ACTION_TEST_SETS` to score them.

Each is what a data set has on disk (`restore.action_lists`, `restore.moving_textures`) with the keywords of training
(`restore.labelled_clips.ActionSamples`) or of scoring (`ActionViews`), whose defaults are the published protocols.
"""

from collections.abc import Callable
from dataclasses import dataclass

from restore.action_lists import classes_in_folders, kinetics, listed, something_something
from restore.labelled_clips import ActionSamples, ActionViews, Labelled, Sampling
from restore.moving_textures import moving_textures

# ---- what is on disk


@dataclass(eq=False, kw_only=True)
class _InFolders:
    """``dataroot`` has a folder for each class with its clips: videos, folders of frames, or those in ``frames``."""

    dataroot: str

    def find(self) -> Labelled:
        """The clips."""
        return classes_in_folders(self.dataroot)


@dataclass(eq=False, kw_only=True)
class _InLists:
    """Clips below ``dataroot`` that the file ``annotations`` lists.

    Clips that are not there are an error, unless ``skip_missing`` leaves them out.
    """

    dataroot: str
    annotations: str
    skip_missing: bool = False


@dataclass(eq=False, kw_only=True)
class _SomethingSomething(_InLists):
    """Something-Something with its own lists; ``labels_file`` is that of the classes."""

    labels_file: str

    def find(self) -> Labelled:
        """The clips."""
        return something_something(
            self.dataroot, self.annotations, self.labels_file, skip_missing=self.skip_missing
        )


@dataclass(eq=False, kw_only=True)
class _Kinetics(_InLists):
    """Kinetics with its own lists."""

    def find(self) -> Labelled:
        """The clips."""
        return kinetics(self.dataroot, self.annotations, skip_missing=self.skip_missing)


@dataclass(eq=False, kw_only=True)
class _Listed(_InLists):
    """Lists of paths and numbers of classes; ``labels_file`` has the names of the classes, one a line."""

    labels_file: str | None = None

    def find(self) -> Labelled:
        """The clips."""
        return listed(self.dataroot, self.annotations, self.labels_file, skip_missing=self.skip_missing)


@dataclass(eq=False, kw_only=True)
class _MovingTextures:
    """Made clips whose classes are direction and speed of a texture, such as "left 2".

    ``directions`` are of left, right, up and down; ``speeds`` are in pixels from a frame to the next different one,
    and every frame is shown ``hold`` times. ``number`` clips of ``photos`` are made from ``seed``, each of ``length``
    frames of ``side`` x ``side`` pixels.
    """

    directions: tuple[str, ...] = ("left", "right")
    speeds: tuple[int, ...] = (2, 4)
    hold: int = 1
    photos: tuple[str, ...] = ("gravel", "brick", "astronaut", "chelsea", "rocket")
    number: int = 4096
    length: int = 16
    side: int = 16
    seed: int = 1

    def find(self) -> Labelled:
        """The clips."""
        return moving_textures(
            self.directions, self.speeds, hold=self.hold, photos=self.photos, number=self.number, length=self.length,
            side=self.side, seed=self.seed,
        )  # fmt: skip


# ---- to train on


@dataclass(eq=False, kw_only=True)
class ActionFolder(_InFolders, ActionSamples):
    """Clips in folders by class: ``<class>/<clip>.mp4``, ``<class>/<clip>/<frame>.jpg``; classes by their names."""


@dataclass(eq=False, kw_only=True)
class SomethingSomething(_SomethingSomething, ActionSamples):
    """Something-Something, version 1 or 2, with its own lists."""


@dataclass(eq=False, kw_only=True)
class Kinetics(_Kinetics, ActionSamples):
    """Kinetics with its own lists."""

    sampling: Sampling = "dense"
    use_hflip: bool = True


@dataclass(eq=False, kw_only=True)
class ActionList(_Listed, ActionSamples):
    """Clips by a list of paths and numbers of classes, as TSN, TSM, PySlowFast and VideoMAE have them."""


@dataclass(eq=False, kw_only=True)
class MovingTextures(_MovingTextures, ActionSamples):
    """Textures that move, made from photographs: trains anywhere, and only the order of frames tells the class."""

    size: int = 16
    short_side: tuple[int, int] | None = None


# ---- to score


@dataclass(eq=False, kw_only=True)
class ActionFolderTest(_InFolders, ActionViews):
    """Clips in folders by class, as of `ActionFolder`."""


@dataclass(eq=False, kw_only=True)
class SomethingSomethingTest(_SomethingSomething, ActionViews):
    """Something-Something by the published protocol of DTF: 1 clip x 3 crops of 256x256, one frame of each segment."""

    size: int = 256
    short_side: int | None = 256


@dataclass(eq=False, kw_only=True)
class KineticsTest(_Kinetics, ActionViews):
    """Kinetics by the published protocol of DTF: 10 clips x 3 crops of 256x256, neighbouring frames."""

    size: int = 256
    short_side: int | None = 256
    sampling: Sampling = "dense"
    clips: int = 10


@dataclass(eq=False, kw_only=True)
class ActionListTest(_Listed, ActionViews):
    """Clips by a list of paths and numbers of classes, as of `ActionList`."""


@dataclass(eq=False, kw_only=True)
class MovingTexturesTest(_MovingTextures, ActionViews):
    """Textures that move, of photographs that are not among those to train on."""

    photos: tuple[str, ...] = ("grass", "coffee")
    number: int = 256
    seed: int = 2
    size: int = 16
    short_side: int | None = None
    crops: int = 1


ACTION_SETS: dict[str, Callable[..., ActionSamples]] = {
    "ActionFolder": ActionFolder,
    "ActionList": ActionList,
    "SomethingSomething": SomethingSomething,
    "Kinetics": Kinetics,
    "MovingTextures": MovingTextures,
}
ACTION_TEST_SETS: dict[str, Callable[..., ActionViews]] = {
    "ActionFolderTest": ActionFolderTest,
    "ActionListTest": ActionListTest,
    "SomethingSomethingTest": SomethingSomethingTest,
    "KineticsTest": KineticsTest,
    "MovingTexturesTest": MovingTexturesTest,
}
