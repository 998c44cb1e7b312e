import random
import sys

import cv2
import numpy as np
import pytest
import torch

from restore import sample
from restore.degrade import imresize, quantize
from restore.sample import low_resolution, sample_clip

pytest.importorskip("skimage", reason="the sample clip is made of scikit-image's photographs")


def _flow(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Optical flow from frame a to frame b, (H, W, 2) in pixels."""
    grey = [(frame.mean(0) * 255).round().to(torch.uint8).numpy() for frame in (a, b)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


@pytest.mark.parametrize("size", [(5, 48, 80), (2, 33, 31), (3, 90, 40), (1, 1, 1)])
def test_any_length_and_size(size):
    clip = sample_clip(*size)
    assert clip.shape == (size[0], 3, *size[1:])
    assert clip.dtype == torch.float32
    assert torch.equal(clip, quantize(clip))


def test_default_size_and_range():
    clip = sample_clip(2)
    assert clip.shape == (2, 3, 256, 448)
    assert 0 <= clip.min() < 0.1
    assert 0.9 < clip.max() <= 1


def test_a_longer_clip_begins_with_the_shorter_one():
    assert torch.equal(sample_clip(6, 40, 56, seed=3)[:4], sample_clip(4, 40, 56, seed=3))


def test_seeds_differ():
    clips = torch.stack([sample_clip(1, 32, 48, seed=seed)[0] for seed in (-1, 0, 1, 6, 7, 12)]).flatten(1)
    distance = torch.cdist(clips, clips, p=1) / clips.shape[1]
    assert (distance + torch.eye(len(clips))).min() > 0.05


@pytest.mark.parametrize("seed", range(6))
def test_background_moves_slowly_and_the_object_fast(seed):
    clip = sample_clip(2, seed=seed)
    assert (clip[1] - clip[0]).abs().mean() > 0.01
    speed = np.linalg.norm(_flow(*clip), axis=-1)
    background, fastest = np.median(speed), np.percentile(speed, 97)
    assert 0.5 < background < 3
    assert background + 0.5 < fastest < 6.5


@pytest.mark.parametrize("frames", [[0, 1, 2], [100, 101, 102]])
def test_motion_is_smooth(frames):
    background = sample._Background(sample.photograph("astronaut"), (256, 448), random.Random(0))
    x = torch.tensor([background.path.at(t)[:2] for t in frames])
    velocity = x.diff(dim=0)
    assert velocity.diff(dim=0).abs().max() < 0.2


def test_the_object_hides_the_background_and_uncovers_it():
    item = sample._MovingObject(sample._OBJECTS[0], (48, 80), random.Random(1))
    black, white = torch.zeros(3, 96, 160), torch.ones(3, 96, 160)
    pairs = [(item.over(black.clone(), t), item.over(white.clone(), t)) for t in range(0, 40, 4)]
    hidden = torch.stack([(a - b).abs().amax(0) < 1e-6 for a, b in pairs])
    assert 0.05 < hidden.float().mean() < 0.5
    assert (hidden.any(0) & ~hidden.all(0)).float().mean() > 0.1


@pytest.mark.parametrize(("name", "size"), [("rocket", (256, 448)), ("astronaut", (300, 100))])
def test_the_camera_never_sees_the_photos_border(monkeypatch, name, size):
    background = sample._Background(sample.photograph(name), size, random.Random(2))
    seen = []

    def record(_photo, _size, position):
        seen.append(position.flatten(0, 1))
        return torch.zeros(3, *position.shape[:2])

    monkeypatch.setattr(sample, "_look_up", record)
    for t in range(0, 3000, 97):
        background.at(t)
    rows, columns = background.photo_size
    assert min(p.min() for p in seen) >= 0
    assert all((p.amax(0) <= torch.tensor([columns, rows])).all() for p in seen)


def test_low_resolution_follows_the_protocol():
    clip = sample_clip(5, 32, 48)
    assert torch.equal(low_resolution(clip), quantize(imresize(clip[[0, 2, 4]], 0.25)))
    assert low_resolution(clip[None], scale=2, time_scale=1).shape == (1, 5, 3, 16, 24)


@pytest.mark.parametrize("size", [(0, 8, 8), (1, 0, 8), (1, 8, -1)])
def test_bad_size(size):
    with pytest.raises(ValueError, match="at least 1"):
        sample_clip(*size)


def test_a_missing_scikit_image_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        sample_clip(1, 8, 8)
