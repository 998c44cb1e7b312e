"""Motion from correlation: laws of flows, a known translation found again, what merging gains."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from archs.layers.motion_prior import CorrelationMotion, FrameMotion, MiddleMotion, compose, invert

HEIGHT, WIDTH = 48, 64
INSIDE = (..., slice(12, -12), slice(12, -12))


def texture(dy: float, dx: float, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A picture (3, h, w) of waves from 6 to 40 pixels, moved by (dy, dx); exact at any fraction of a pixel."""
    generator = torch.Generator().manual_seed(0)
    angle, phase = 6.2832 * torch.rand(2, 40, generator=generator)
    wavelength = 6 * (40 / 6) ** torch.rand(40, generator=generator)
    colour = torch.randn(3, 40, generator=generator) * wavelength.sqrt()
    rows, columns = torch.arange(height)[:, None, None] - dy, torch.arange(width)[:, None] - dx
    waves = torch.sin(6.2832 / wavelength * (angle.sin() * rows + angle.cos() * columns) + phase)
    picture = torch.einsum("ck,hwk->chw", colour, waves)
    return 0.5 + 0.12 * picture / picture.std()


def moving(velocity: tuple[float, float], frames: int = 3) -> Tensor:
    """A clip (1, T, 3, h, w) of the texture that moves by ``velocity`` a frame."""
    return torch.stack([texture(velocity[0] * i, velocity[1] * i) for i in range(frames)])[None]


def vector(dy: float, dx: float) -> Tensor:
    return torch.tensor([dy, dx], dtype=torch.float32)[:, None, None]


def constant(dy: float, dx: float, size: tuple[int, int] = (6, 8)) -> Tensor:
    return vector(dy, dx).expand(1, 2, *size)


def translations(velocities: list[tuple[float, float]]) -> MiddleMotion:
    """The true motion of a clip that moves as a whole, by another velocity from gap to gap."""
    to_later = torch.stack([constant(dy / 2, dx / 2) for dy, dx in velocities], dim=1)
    return MiddleMotion(-to_later, to_later, torch.full_like(to_later[:, :, :1], 0.5))


@pytest.fixture(scope="module")
def untrained() -> CorrelationMotion:
    torch.manual_seed(0)
    return CorrelationMotion().requires_grad_(False)


# ---- laws of flows


def test_translations_add_up():
    assert_close(compose(constant(1.5, -2), constant(0.25, 3)), constant(1.75, 1))
    assert_close(invert(constant(1.5, -2)), constant(-1.5, 2))


def test_the_inverse_leads_back():
    """A smooth flow of up to 1.5 pixels, there and back, in both orders."""
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    flow = torch.stack([1.5 * torch.sin(columns / 8), torch.cos(rows / 9)])[None]
    inside = (..., slice(4, -4), slice(4, -4))
    for there, back in ((flow, invert(flow)), (invert(flow), flow)):
        assert compose(there, back)[inside].abs().max() < 0.25
    assert flow[inside].abs().max() > 1.4


def test_composition_reads_the_second_flow_where_the_first_leads():
    second = torch.arange(8.0).expand(1, 2, 6, 8)
    assert_close(compose(constant(0, 2), second)[..., :-2], constant(0, 2)[..., :-2] + second[..., 2:])


# ---- motion between frames


def test_steps_between_frames_and_middles():
    steps = translations([(2, -4), (6, 0)]).frames()
    assert_close(steps.following[0, :, :, 3, 3], torch.tensor([[1.0, -2], [1, -2], [3, 0], [3, 0]]))
    assert_close(steps.preceding, -steps.following)


@pytest.mark.parametrize("j", range(5))
def test_chains_of_steps(j):
    velocities = [(2.0, -4.0), (6.0, 0.0)]
    steps = translations(velocities).frames()
    places = torch.tensor([[0.0, 0], [1, -2], [2, -4], [5, -4], [8, -4]])  # of the content, in frames and middles
    others = [i for i in range(5) if i != j]
    flows = steps.between(j, others)
    assert flows.shape == (1, 4, 2, 6, 8)
    assert_close(flows[0, :, :, 3, 3], places[others] - places[j])
    for i in others:
        assert_close(steps.between(i, [j]), -steps.between(j, [i]))


def test_a_chain_reads_each_step_where_the_last_one_leads():
    following = torch.stack([constant(0, 2), torch.arange(8.0).expand(1, 2, 6, 8)], dim=1)
    chained = FrameMotion(following, -following).between(0, [2])[:, 0]
    assert_close(chained, compose(following[:, 0], following[:, 1]))


@pytest.mark.parametrize("gap", [1, 2])
def test_to_the_previous_gap(gap):
    """Forward in time the content of the gap before lies half of both velocities behind, backward ahead."""
    velocities = torch.tensor([[2.0, -4.0], [6.0, 0.0], [1.0, 3.0]])
    flow = translations([tuple(v) for v in velocities.tolist()]).to_previous_gap(gap)
    assert flow.shape == (2, 2, 6, 8)
    assert_close(flow[0, :, 3, 3], -(velocities[gap] + velocities[gap - 1]) / 2)
    backward = velocities.flip(0)
    assert_close(flow[1, :, 3, 3], (backward[gap] + backward[gap - 1]) / 2)


# ---- correlation


@pytest.mark.parametrize("velocity", [(0.0, 3.0), (-1.5, 0.5), (2.5, -3.25), (-5.0, 1.3), (-8.0, 14.0)])
def test_a_known_translation(untrained, velocity):
    """Before any training, to a third of a pixel on average; half a pixel is the step of the candidates."""
    motion = untrained(moving(velocity))
    half = vector(*velocity) / 2
    assert motion.to_later.shape == (1, 2, 2, HEIGHT, WIDTH)
    assert (motion.to_later - half)[INSIDE].abs().mean() < 0.33
    assert (motion.to_earlier + half)[INSIDE].abs().mean() < 0.33
    assert torch.equal(motion.mix, torch.full_like(motion.mix, 0.5))


def test_every_gap_by_itself(untrained):
    clip = torch.stack([texture(0, 0), texture(0, 4), texture(-3, 4)])[None]
    motion = untrained(clip)
    assert (motion.to_later[0, 0] - vector(0, 2))[INSIDE].abs().mean() < 0.33
    assert (motion.to_later[0, 1] - vector(-1.5, 0))[INSIDE].abs().mean() < 0.33
    alone = untrained(clip[:, 1:])
    assert_close(alone.to_later[:, 0], motion.to_later[:, 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip", [moving((0.0, 0.0)), torch.full((1, 2, 3, 16, 16), 0.3)], ids=["texture", "flat"])
def test_what_stands_still(untrained, clip):
    motion = untrained(clip)
    assert motion.to_later.abs().max() < 0.02
    assert motion.to_earlier.abs().max() < 0.02


def test_contrast_and_brightness_do_not_matter(untrained):
    clip = moving((1.5, -2.0), frames=2)
    bright, dim = untrained(clip), untrained(0.1 * clip + 0.5)
    assert_close(bright.to_later[INSIDE], dim.to_later[INSIDE], atol=0.15, rtol=0)


def test_time_reversed(untrained):
    clip = moving((2.0, -3.0))
    clip[:, 1] = texture(1, 1)
    motion, reversed_motion = untrained(clip), untrained(clip.flip(1))
    assert_close(reversed_motion.to_earlier.flip(1), motion.to_later, atol=1e-3, rtol=0)
    assert_close(reversed_motion.to_later.flip(1), motion.to_earlier, atol=1e-3, rtol=0)


def test_merging_along_the_motion(untrained):
    """The frame half-way: clearly better than the average of its neighbours, which is blurred twice over."""
    clip = moving((2.0, 5.0), frames=2)
    truth = texture(1.0, 2.5)
    merged = untrained(clip).merge(clip)
    assert merged.shape == (1, 1, 3, HEIGHT, WIDTH)
    error = (merged[0, 0] - truth)[INSIDE].square().mean()
    average = (clip.mean(1)[0] - truth)[INSIDE].square().mean()
    assert error < 0.1 * average


def test_mix_is_the_share_of_the_earlier_frame():
    clip = torch.rand(1, 2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    still = constant(0, 0)[:, None]
    for share in (0.0, 0.25, 1.0):
        merged = MiddleMotion(still, still, torch.full((1, 1, 1, 6, 8), share)).merge(clip)
        assert_close(merged[:, 0], share * clip[:, 0] + (1 - share) * clip[:, 1])
