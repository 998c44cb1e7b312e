"""Training sets: aligned, augmented alike, and a function of seed and number alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from restore.data import ClipCrops, ClipFolder, SampleClips, SampleNumbers, find_clips, store, training_batches
from restore.degrade import imresize, quantize
from restore.writers import FrameFolderWriter, VideoWriter


def gradient_clip(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """Bytes in which the place, the channel and the time of every pixel can be read."""
    rows = torch.arange(height)[:, None] + torch.zeros(height, width)
    columns = torch.arange(width)[None] + torch.zeros(height, width)
    planes = [torch.stack([rows * 2, columns * 2, torch.full_like(rows, 20 * t)]) for t in range(frames)]
    return torch.stack(planes).byte()


def write_folder(folder: Path, frames: torch.Tensor) -> None:
    with FrameFolderWriter(folder) as writer:
        for i, frame in enumerate(frames):
            writer.write(str(i), frame)


def crops(**changes) -> ClipCrops:
    arguments = {
        "scale": 4, "time_scale": 2, "num_frame": 5, "gt_size": 32,
        "use_hflip": False, "use_rot": False, "random_reverse": False, **changes,
    }  # fmt: skip
    return ClipCrops([store("a", gradient_clip(), 4), store("b", gradient_clip(7), 4)], **arguments)


def test_input_and_truth_show_the_same_place_and_time():
    samples = crops(use_hflip=True, use_rot=True, random_reverse=True)
    seen = set()
    for number in range(40):
        sample = samples[number]
        assert sample["lq"].shape == (3, 3, 8, 8) and sample["gt"].shape == (5, 3, 32, 32)
        # an interior low-resolution pixel is the mean of its 4x4 block of a linear ramp, to rounding
        blocks = torch.nn.functional.avg_pool2d(sample["gt"][::2], 4)
        assert (blocks - sample["lq"])[..., 2:-2, 2:-2].abs().max() <= 1.01 / 255
        gt = sample["gt"]
        seen.add((bool(gt[0, 0, 0, 0] < gt[0, 0, -1, 0]), bool(gt[0, 2].mean() < gt[-1, 2].mean())))
    assert len(seen) == 4  # flips and reversals do happen


def test_the_low_resolution_is_that_of_whole_frames():
    stored = store("a", torch.randint(0, 256, (2, 3, 41, 54), dtype=torch.uint8), 4)
    assert stored.gt.shape == (2, 3, 40, 52) and stored.lq.shape == (2, 3, 10, 13)
    expected = quantize(imresize(stored.gt[1].float() / 255, 0.25))
    assert torch.allclose(stored.lq[1].float() / 255, expected, atol=1e-6)


def test_a_sample_depends_on_seed_and_number_alone():
    one, two = crops(), crops()
    for number in (3, 1000, 5):
        assert torch.equal(one[number]["gt"], two[number]["gt"])
    two.seed = 1
    assert any(one[n]["name"] != two[n]["name"] for n in range(8))


def test_every_stretch_of_frames_is_used():
    samples = crops()
    names = {"".join(samples[number]["name"].split(":")[:2]) for number in range(200)}
    assert names == {f"a{start}" for start in range(5)} | {f"b{start}" for start in range(3)}


def test_batches_continue_where_they_stopped():
    def names(first: int, last: int, workers: int) -> list[list[str]]:
        return [
            batch["name"]
            for batch in training_batches(crops(), SampleNumbers(first, last, 2), workers=workers, seed=7)
        ]

    whole = names(0, 6, 0)
    assert names(0, 2, 0) + names(2, 6, 1) == whole


def test_a_folder_of_videos_and_frame_folders(tmp_path):
    frames = gradient_clip().float() / 255
    (tmp_path / "films").mkdir()
    with VideoWriter(tmp_path / "films" / "one.mp4", 25) as writer:
        for frame in frames:
            writer.write(frame)
    write_folder(tmp_path / "stills" / "two", frames)
    assert {clip.name for clip in find_clips(str(tmp_path))} == {"one", "two"}
    samples = ClipFolder(dataroot_gt=str(tmp_path), num_frame=5, gt_size=32, exclude=("one",))
    assert [clip.name for clip in samples.clips] == ["two"]
    np.testing.assert_array_equal(samples.clips[0].gt, gradient_clip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataroot_gt": "nowhere"}, "nowhere: no such folder.*options/sample.yml"),
        ({"gt_size": 30}, "gt_size=30 is not a multiple of scale=4"),
        ({"num_frame": 6}, "num_frame=6 is not a multiple of time_scale=2 plus 1"),
        ({"num_frame": 99}, "no clip has 99 frames"),
        ({"exclude": ("three",)}, "exclude names clips that are not there: three"),
    ],
)
def test_errors(tmp_path, arguments, message):
    write_folder(tmp_path / "two", gradient_clip(5).float() / 255)
    with pytest.raises(ValueError, match=message):
        ClipFolder(**{"dataroot_gt": str(tmp_path), "num_frame": 5, "gt_size": 32, **arguments})


def test_sample_clips_need_no_files():
    samples = SampleClips(clips=1, frames=5, height=48, width=64, num_frame=5, gt_size=32)
    assert samples[0]["gt"].shape == (5, 3, 32, 32)
