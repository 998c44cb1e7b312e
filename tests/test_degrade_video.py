import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from restore.degrade import bd, imresize, quantize
from restore.degrade_video import DEGRADATIONS, BlurDown, RealWorldDegradation, replay
from restore.metrics import psnr
from restore.sample import sample_clip

CLEAN = {"noise_prob": 0.0, "jpeg_prob": 0.0, "jpeg_prob2": 0.0, "video_prob": 0.0, "video_prob2": 0.0}
BUSY = {"noise_prob": 1.0, "jpeg_prob": 1.0, "jpeg_prob2": 1.0, "video_prob": 1.0}
TRACKS = ("sigma_x", "sigma_y", "angle", "beta", "omega", "sigma", "scale", "quality")


def _degraded(seed: int) -> torch.Tensor:
    torch.set_num_threads(1)
    return RealWorldDegradation(**BUSY)(sample_clip(2, 48, 64), np.random.default_rng(seed))


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("shape", [(1, 32, 48), (3, 37, 51), (2, 2, 5)])
def test_size_and_levels(name, shape):
    clip = torch.rand(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
    for seed, scale in enumerate([4, 4, 2, 3, 1]):
        degrade = DEGRADATIONS[name](scale=scale)
        out = degrade(clip, np.random.default_rng(seed))
        assert out.shape == (shape[0], 3, *(math.ceil(side / scale) for side in shape[1:]))
        assert out.dtype == torch.float32 and torch.equal(out, quantize(out))


def test_bicubic_and_bd_are_those_of_single_frames():
    clip, rng = sample_clip(2, 32, 48), np.random.default_rng(0)
    assert torch.equal(DEGRADATIONS["bicubic"](scale=4)(clip, rng), quantize(imresize(clip, 0.25)))
    aligned = BlurDown(taps=12, phase="centre", border="replicate")
    assert torch.equal(aligned(clip, rng), quantize(bd(clip, taps=12, phase="centre", border="replicate")))
    assert aligned.shift == 0 and BlurDown().shift == -1.5


def test_the_result_depends_on_the_seed_alone():
    expected = [_degraded(seed) for seed in (0, 1)]
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    assert torch.equal(_degraded(0), expected[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*expected)
    in_workers = list(DataLoader([0, 1], batch_size=None, num_workers=2, collate_fn=_degraded))
    assert all(map(torch.equal, in_workers, expected))


def test_a_record_replays():
    clip, degrade = sample_clip(2, 40, 56), RealWorldDegradation(**BUSY)
    record = degrade.draw(2, 40, 56, np.random.default_rng(3))
    stored = json.loads(json.dumps(record))
    assert stored == record
    out = replay(clip, stored)
    assert torch.equal(out, replay(clip, record))
    assert torch.equal(out, degrade(clip, np.random.default_rng(3)))
    with pytest.raises(ValueError, match=r"\(2, 40, 56\), not \(1, 40, 56\)"):
        replay(clip[:1], record)
    with pytest.raises(ValueError, match="unknown step 'melt'"):
        replay(clip, {**record, "steps": [{"step": "melt"}]})


def _tracks(drift: float, frames: int = 30):
    """(name, values) of everything given once a frame, from many records."""
    degrade = RealWorldDegradation(drift=drift, **BUSY)
    for seed in range(40):
        record = degrade.draw(frames, 64, 64, np.random.default_rng(seed))
        for step in record["steps"]:
            yield from ((name, value) for name, value in step.items() if name in TRACKS)


def test_without_drift_all_frames_are_equal():
    tracks = list(_tracks(0))
    assert {name for name, _ in tracks} == set(TRACKS)
    assert all(len(set(values)) == 1 for _, values in tracks)


@pytest.mark.parametrize("drift", [0.3, 1.0])
def test_drift_is_gradual_and_stays_in_range(drift):
    widths = {"sigma_x": 2.3, "sigma_y": 2.3, "angle": 2 * math.pi, "beta": 3.5, "omega": 2.1, "sigma": 14.0,
              "scale": 1.45, "quality": 45}  # fmt: skip
    moved = set()
    for name, values in _tracks(drift):
        steps = np.abs(np.diff(values))
        assert steps.max() <= 0.03 * drift * widths[name] + (1 if name == "quality" else 1e-9)  # a quality is whole
        assert min(values) + (math.pi if name == "angle" else 0) >= 0 and max(values) <= 95
        if np.ptp(values) > 0.1 * drift * widths[name]:
            moved.add(name)
    assert moved == set(TRACKS)


def test_drift_shows_in_the_frames():
    clip = sample_clip(1, 64, 64).expand(12, -1, -1, -1)
    blurs = {**CLEAN, "blur_prob": 1.0, "blur_prob2": 0.0, "sinc_prob": 0.0, "final_sinc_prob": 0.0}
    out = RealWorldDegradation(drift=1.0, scale=1, **blurs)(clip, np.random.default_rng(1))
    near, far = (out[1:] - out[:-1]).abs().mean(), (out[-1] - out[0]).abs().mean()
    assert 0 < near < far


def test_a_static_clip_stays_static():
    clip = sample_clip(1, 50, 66).expand(4, -1, -1, -1)
    for seed in range(12):
        out = RealWorldDegradation(drift=0.0, **CLEAN)(clip, np.random.default_rng(seed))
        assert all(torch.equal(frame, out[0]) for frame in out)


def test_results_are_damaged_but_recognisable():
    clip = sample_clip(3, 96, 128, seed=1)
    clean = quantize(imresize(clip, 0.25))
    values = [psnr(RealWorldDegradation()(clip, np.random.default_rng(s)), clean).mean().item() for s in range(8)]
    assert min(values) > 14 and max(values) < 40


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"drift": 1.5},
        {"blur_prob": -0.1},
        {"blur_sigma": (2.0, 1.0)},
        {"jpeg_range2": (0, 90)},
        {"crf_range": (20, 60)},
        {"resize_prob": (0.5, 0.5, 0.5)},
        {"kernel_list": ("iso",)},
        {"kernel_list": ("box",), "kernel_prob": (1.0,)},
        {"video_codecs": ()},
        {"video_codecs": ("divx",)},
    ],
)
def test_bad_ranges(wrong):
    with pytest.raises(ValueError, match="divx" if "divx" in str(wrong) else "kernel|" + next(iter(wrong))):
        RealWorldDegradation(**wrong)


def test_bad_settings_of_the_others():
    with pytest.raises(ValueError, match="phase='last'"):
        BlurDown(phase="last")
    with pytest.raises(ValueError, match="scale=0"):
        DEGRADATIONS["bicubic"](scale=0)
    with pytest.raises(ValueError, match="0 frames"):
        RealWorldDegradation().draw(0, 8, 8, np.random.default_rng(0))
