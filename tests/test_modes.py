"""Restoring without enlarging, without interpolating, or frame by frame: `scale`, `time_scale` and `exchange`."""

import pytest
import torch
from tiny import (
    ALONE,
    COMPACT,
    DEBLUR,
    HALF,
    HALF_RECURRENT,
    JOINT,
    OFF,
    PUBLISHED,
    RECURRENT,
    awaken,
    seeded_clip,
    unchecked,
)

from archs import STDAN, STDANFreq
from archs.layers.motion_prior import MiddleMotion


def motion_of(vector: tuple[float, float], h: int = 12, w: int = 16) -> MiddleMotion:
    """A clip of three frames that moves by 2 * ``vector`` a frame."""
    flow = torch.tensor(vector)[:, None, None].expand(1, 2, 2, h, w)
    return MiddleMotion(-flow, flow, torch.full((1, 2, 1, h, w), 0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        DEBLUR, {**RECURRENT, **OFF, "scale": 1, "time_scale": 1}, {**ALONE, **OFF}, HALF, {**HALF_RECURRENT, **OFF},
        {**HALF, "upsampler": "pixelshuffle", "dct_condition": True},
    ],
)  # fmt: skip
def test_deblurring_starts_as_the_identity(arguments):
    network = STDANFreq(**arguments).eval()
    side = network.multiple_of
    clip = seeded_clip(1, 3, 3, 2 * side, side)
    with torch.no_grad():
        assert torch.equal(network(clip), clip)


def test_the_joint_mode_starts_with_its_input_and_merged_neighbours():
    network = STDAN(**JOINT).eval()
    clip = seeded_clip(1, 1, 3, 32, 32).expand(1, 3, 3, 32, 32)  # nothing moves: a frame in between is its neighbours
    with torch.no_grad():
        assert (network(clip) - clip[:, :1]).abs().max() < 1e-4


def test_one_grid_serves_both_scales():
    """After the first layers and before the skip the two networks are one."""
    torch.manual_seed(0)
    enlarging, deblurring = (awaken(STDAN(**{**PUBLISHED, "scale": scale})) for scale in (4, 1))
    keys = [{key for key in net.state_dict() if not key.startswith("embed.")} for net in (enlarging, deblurring)]
    assert keys[0] == keys[1]
    assert (enlarging.multiple_of, deblurring.multiple_of) == (8, 32)


@pytest.mark.parametrize(
    ("embed", "grid", "multiple"), [("strided", 4, 16), ("strided", 2, 8), ("unshuffle", 4, 16), ("unshuffle", 2, 8)]
)
def test_the_grid_of_deblurring(embed, grid, multiple):
    """Sides are multiples of four features, motion is matched on their grid, and the result has the input's size."""
    network = awaken(STDAN(**{**HALF_RECURRENT, "embed": embed, "grid": grid})).eval()
    assert network.multiple_of == multiple
    clip = seeded_clip(1, 3, 3, multiple, 3 * multiple)
    with torch.no_grad():
        assert network.encode(clip).shape[-2:] == (multiple // grid, 3 * multiple // grid)
        assert network(clip).shape == clip.shape


def test_unshuffled_pixels_reach_the_features():
    """The first convolution sees the pixels of a feature, one channel for each colour and place."""
    network = STDAN(**{**ALONE, "grid": 2, "embed": "unshuffle"})
    assert network.embed[1].weight.shape == (8, 12, 3, 3)
    clip = seeded_clip(1, 1, 3, 8, 8)
    pixels = torch.stack([clip[0, 0, colour, dy::2, dx::2] for colour in range(3) for dy in (0, 1) for dx in (0, 1)])
    assert torch.allclose(network.embed(clip[0]), network.embed[1](pixels[None]))


@pytest.mark.parametrize("arguments", [{**PUBLISHED, "time_scale": 1}, DEBLUR, HALF])
def test_a_single_frame_is_a_clip(arguments):
    network = awaken(STDAN(**arguments)).eval()
    side = network.multiple_of
    with torch.no_grad():
        assert network(seeded_clip(1, 1, 3, side, side)).shape == (1, 1, 3, network.scale * side, network.scale * side)


@pytest.mark.parametrize(("arguments", "independent"), [(ALONE, True), (DEBLUR, False)])
def test_without_exchange_frames_are_independent(arguments, independent):
    network = awaken(STDAN(**arguments)).eval()
    clip = seeded_clip(1, 3, 3, 16, 16)
    with torch.no_grad():
        difference = (network(clip)[:, 1] - network(clip[:, 1:2])[:, 0]).abs().max()
    assert (difference < 1e-5) == independent


def test_guidance_of_the_attention_learns():
    """Every parameter of it has moved within three steps, from a start that changes nothing."""
    torch.manual_seed(0)
    plain, network = (STDANFreq(**DEBLUR, **{**OFF, "guide": on, "prior": on}) for on in (False, True))
    network.load_state_dict(plain.state_dict(), strict=False)
    clip = seeded_clip(1, 3, 3, 32, 32)
    awake = [awaken(net.upsample) and net(clip) for net in (plain.eval(), network.eval())]
    assert (awake[0] - awake[1]).abs().max() < 1e-5
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    seen: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (network(clip) - seeded_clip(1, 3, 3, 32, 32, seed=1)).abs().mean().backward()
        seen |= {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    guidance = {key for key, _ in network.named_parameters() if ".guidance." in key}
    assert guidance and guidance <= seen


def test_steps_are_two_half_steps():
    motion = motion_of((1.0, -0.5))
    whole, halves = motion.steps(), motion.frames()
    for here, there in [(0, 1), (1, 2), (2, 0)]:
        difference = whole.between(here, [there]) - halves.between(2 * here, [2 * there])
        assert difference.abs().max() < 1e-5
    assert torch.allclose(whole.following[0, 0, :, 5, 5], torch.tensor([2.0, -1.0]))


def test_enlarged_motion_moves_as_far():
    motion, finer = motion_of((1.0, -0.5)), motion_of((4.0, -2.0), 48, 64)
    assert torch.allclose(motion.enlarged(4).to_later, finer.to_later)
    assert torch.allclose(motion.enlarged(4).mix, finer.mix)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"scale": 2}, "scale=2 is none of 4, 1"),
        ({"time_scale": 3}, "time_scale=3 is none of 2, 1"),
        ({"grid": 3}, "grid=3 is none of 4, 2"),
        ({"embed": "pool"}, "embed='pool' is none of strided, unshuffle"),
        ({"grid": 2}, "grid=2 is for scale=1"),
        ({"grid": 2, "scale": 1, "extractor": "dtf_resnet"}, "grid=2: extractor='dtf_resnet' is for grid=4"),
        ({"exchange": "votes"}, "exchange='votes' is none of attention, propagation, null"),
        ({"exchange": None, **OFF, "guide": True, "time_scale": 1}, "set exchange='attention'"),
        ({"time_scale": 1, **OFF, "motion_branch": "explicit"}, "between='lstfi' and time_scale=2"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, rule):
    with unchecked(), pytest.raises(ValueError, match=rule):
        STDANFreq(**{**PUBLISHED, **arguments})


def test_compact_networks_need_flows_for_warping_alone():
    STDAN(**{**RECURRENT, "time_scale": 1, "motion_prior": None, "exchange": "attention"})
    with pytest.raises(ValueError, match="follow flows"):
        STDAN(**{**COMPACT, "between": "warp", "motion_prior": None})
