"""What cutting a clip changes of its restored frames: nothing without a cut, less with more overlap, as it is said."""

import pytest
import torch
from torch import Tensor, nn

from archs import VideoNet
from restore.seams import Seams, seams, uncut


class Blurred(VideoNet):
    """Every pixel the mean of a square around it that reaches ``reach`` pixels, and of the frames beside it."""

    scale = 2

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.blur = nn.AvgPool2d(2 * reach + 1, stride=1, padding=reach)

    def forward(self, clip: Tensor) -> Tensor:
        self.check_clip(clip)
        spread = (clip + clip.roll(1, 1)) / 2  # the first frame sees the last: what windows change
        blurred = self.blur(spread.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return blurred.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Step(VideoNet):
    """All pixels of a call are the number of its columns, in hundredths."""

    def forward(self, clip: Tensor) -> Tensor:
        return torch.full_like(clip, clip.shape[-1] / 100)


def noise(frames: int, height: int, width: int) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_no_cut_is_no_difference():
    assert seams(Blurred(2), noise(3, 20, 31)) == Seams(0.0, 0.0)
    assert seams(Blurred(2), noise(3, 20, 31), tile=31, window=3) == Seams(0.0, 0.0)


def test_differences_fall_with_the_overlap():
    clip, net = noise(2, 40, 60), Blurred(3)
    whole = uncut(net, clip)
    found = [seams(net, clip, whole=whole, tile=32, tile_overlap=overlap) for overlap in (0, 4, 8, 16)]
    for less, more in zip(found[1:], found, strict=False):
        assert 0 < less.largest < more.largest
        assert 0 < less.mean < more.mean
    assert all(each.mean < each.largest for each in found)


def test_figures_are_those_of_the_restored_values():
    clip = noise(1, 16, 48)
    found = seams(Step(), clip, tile=32, tile_overlap=0)  # 0.32 in the place of 0.48 everywhere
    assert found.largest == pytest.approx(0.16)
    assert found.mean == pytest.approx(0.16)


def test_windows_differ_where_a_network_looks_beyond_them():
    clip, net = noise(6, 8, 8), Blurred(0)
    found = seams(net, clip, window=3, temporal_overlap=1)
    whole = uncut(net, clip)
    assert found.largest > 0.1
    assert found == seams(net, clip, whole=whole, window=3)
    assert found.mean < seams(net, clip, whole=whole, window=2).mean
    assert len(whole) == 6
    assert len(uncut(net, clip[:1])) == 1
    with pytest.raises(ValueError, match="temporal_overlap=4"):
        seams(net, clip, window=4, temporal_overlap=4)
