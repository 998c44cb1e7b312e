import math

import cv2
import numpy as np
import pytest
import torch
from tiny import seeded_clip, unchecked
from torch import Tensor
from trunks import alexnet_file, lpips

from restore.degrade import quantize
from restore.metric_table import METRICS
from restore.metrics import Metric
from restore.optical_flow import Farneback, grey_levels, visible
from restore.perceptual import LPIPS
from restore.schema import Component, OptionError, construct
from restore.temporal import TLP, TOF, Flicker, WarpingError


def _moving(step: tuple[int, int], frames: int = 4, size: tuple[int, int] = (96, 128), seed: int = 0) -> Tensor:
    """A smooth texture that moves by whole pixels (rows, columns) a frame."""
    coarse = seeded_clip(1, 3, 40, 48, seed=seed)
    texture = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    starts = [(16 - t * step[0], 16 - t * step[1]) for t in range(frames)]
    return quantize(torch.stack([texture[:, y : y + size[0], x : x + size[1]] for y, x in starts]))


@pytest.fixture
def trunk(tmp_path) -> str:
    lpips()
    return str(alexnet_file(tmp_path / "trunk.pth"))


@pytest.fixture(params=["tof", "tlp", "warping_error", "flicker"])
def metric(request) -> Metric:
    keys = {"weights": request.getfixturevalue("trunk")} if request.param == "tlp" else {}
    return construct(METRICS, Component(request.param, keys), "val.metrics")


def test_the_interface(metric):
    x = _moving((0, 1), 3)
    before = x.clone()
    assert isinstance(metric, Metric)
    assert metric.frames == 2 and not metric.higher_is_better and metric.label and metric.describe()
    for frames in (3, 2, 1):
        values = metric(x[:frames], x.flip(-1)[:frames])
        assert values.shape == (frames - 1,) and values.dtype == torch.float64
    assert torch.equal(x, before)
    with unchecked(), pytest.raises(ValueError, match="differ in shape"):
        metric(x, x[:2])


@pytest.mark.parametrize("step", [(0, 0), (1, -2)], ids=["still", "moving"])
def test_a_clip_restored_exactly(metric, step):
    x = _moving(step)
    if metric.label.startswith("E_warp"):  # flow and interpolation are not exact
        assert metric(x, x).max() < (0.02 if any(step) else 0.001)
    else:
        assert metric(x, x).tolist() == [0, 0, 0]


def test_a_value_belongs_to_the_later_frame(metric):
    truth = _moving((0, 0), 5)
    restored = truth.clone()
    restored[3] = truth[3].roll(2, -1)
    values = metric(restored, truth)
    assert values[:2].max() < 0.001
    assert values[2:].min() > 0.01


@pytest.mark.parametrize("step", [(0, 2), (1, 1), (-2, 0)])
def test_tof_is_the_length_of_the_wrong_motion(step):
    """Twice the rows and columns at once would be a 1-norm, half of it a mean of components."""
    values = TOF()(_moving((1 + step[0], step[1] - 1)), _moving((1, -1)))
    torch.testing.assert_close(values, torch.full_like(values, math.hypot(*step)), rtol=0.03, atol=0)


@pytest.mark.parametrize("central_crop", [True, False])
def test_tof_by_the_published_parameters(central_crop):
    """Farneback(0.5, 3, 15, 3, 5, 1.2) of 8-bit grey frames; of 96x128 the inner 64x96 count."""
    clips = _moving((1, 0), 2), _moving((0, 1), 2, seed=1)
    flows = []
    for clip in clips:
        rgb = (clip * 255).round().byte().permute(0, 2, 3, 1).numpy()
        grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in rgb]
        flows.append(cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 3, 15, 3, 5, 1.2, 0))
    distance = np.linalg.norm(np.subtract(*flows).astype(float), axis=-1)
    expected = distance[16:80, 16:112].mean() if central_crop else distance.mean()
    assert TOF(central_crop=central_crop)(*clips).item() == pytest.approx(expected, rel=1e-9)


def test_small_frames_have_no_centre(trunk):
    x = _moving((0, 1), 2)[..., :47, :]
    for metric in (TOF(), TLP(weights=trunk)):
        with pytest.raises(ValueError, match="at least 48x48 px, got 47x128: set it to false"):
            metric(x, x)
    assert TOF(central_crop=False)(x, x).tolist() == [0]


def test_tlp_is_the_difference_of_two_distances(trunk):
    restored, truth = _moving((2, 0), 3), _moving((0, 1), 3)
    distance, centre = LPIPS(weights=trunk), (..., slice(16, 80), slice(16, 112))
    for central_crop, region in ((True, centre), (False, ...)):
        changes = [distance(x[region][:-1], x[region][1:]) for x in (restored, truth)]
        expected = 100 * (changes[0] - changes[1]).abs()
        assert torch.equal(TLP(weights=trunk, central_crop=central_crop)(restored, truth), expected)
    still = TLP(weights=trunk)(truth[:1].expand(3, -1, -1, -1).contiguous(), truth)
    assert still.min() > 0, "a frozen clip has no distance from frame to frame"


def test_warping_error_of_alternating_brightness_has_a_closed_form():
    truth = _moving((0, 0)) * 0.5
    restored = truth + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(4, 1, 1, 1)
    expected = torch.full((3,), 10.0, dtype=torch.float64)
    torch.testing.assert_close(WarpingError()(restored, truth), expected, rtol=1e-3, atol=0)
    assert WarpingError()(truth + 0.1, truth).max() < 0.001, "an error that stays is steady"


def test_warping_error_follows_the_true_motion():
    truth = _moving((2, -3))
    noisy = quantize(truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)))
    frozen = truth[:1].expand_as(truth).contiguous()
    exact, noise, still = (WarpingError()(x, truth).mean() for x in (truth, noisy, frozen))
    assert exact < 0.05
    assert noise > 3, "noise of standard deviation 0.05, twice, less what interpolation smooths"
    assert still > 20 * exact, "a frozen picture does not follow"


def test_warping_error_of_nothing_visible_is_nan(monkeypatch):
    monkeypatch.setattr(Farneback, "__call__", lambda self, first, second: torch.full((2, *first.shape), 1000.0))
    x = _moving((0, 0), 3)
    assert WarpingError()(x, x).isnan().all()


def test_flicker_is_the_change_of_the_error():
    truth = _moving((1, 2)) * 0.5
    alternating = truth + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(4, 1, 1, 1)
    expected = torch.full((3,), 21.9, dtype=torch.float64)  # luma spans 219 levels
    torch.testing.assert_close(Flicker()(alternating, truth), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(Flicker()(truth + 0.1, truth), torch.zeros_like(expected), rtol=0, atol=1e-4)
    alternating[..., :5, :] = truth[..., :5, :]
    torch.testing.assert_close(Flicker(crop_border=5)(alternating, truth), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("tof", {"winsize": 1}, "winsize=1 must be at least 3"),
        ("warping_error", {"levels": 0}, "levels=0 must be at least 1"),
        ("tof", {"windowsize": 9}, "unknown key 'windowsize' for tof; did you mean 'winsize'"),
    ],
)
def test_bad_options(name, keys, message):
    with pytest.raises(OptionError, match=message):
        construct(METRICS, Component(name, keys), "val.metrics")


def test_the_protocol_names_what_changes_the_number(trunk):
    phrases = [TOF(), TOF(winsize=21), TOF(levels=5), TOF(central_crop=False), WarpingError(), WarpingError(winsize=21)]
    phrases += [Flicker(), Flicker(crop_border=4), TLP(weights=trunk), TLP(weights=trunk, central_crop=False)]
    assert len({metric.describe() for metric in phrases}) == len(phrases)


def test_flow_points_to_where_things_go():
    grey = grey_levels(_moving((2, -3), 2))
    assert grey.dtype == np.uint8 and grey.shape == (2, 96, 128)
    flow = Farneback()(grey[0], grey[1])[:, 20:-20, 20:-20]
    torch.testing.assert_close(flow.mean((1, 2)), torch.tensor([2.0, -3.0]), rtol=0, atol=0.05)


def test_visible_is_where_flows_agree_within_the_frame():
    there = torch.zeros(2, 20, 30)
    there[1] = 4
    seen = visible(there, -there)
    assert seen[:, :26].all() and not seen[:, 26:].any()
    assert not visible(there, there).any(), "the way back leads elsewhere"
    edge = there.clone()
    edge[:, :, 10:] = 0
    assert not visible(edge, torch.zeros_like(edge))[:, 9].any(), "a motion boundary"
