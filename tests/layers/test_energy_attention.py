"""Energy in the deformable attention: silent at the start, read where the values are, open to observers."""

import pytest
import torch
from tiny import awaken, seeded_clip
from torch import Tensor
from torch.testing import assert_close

from archs.layers.deform_attention import DeformableAttention
from archs.layers.energy_attention import EnergyFusion, FusedTarget, mean_weight_on
from archs.layers.motion_prior import FrameMotion

PARTS = [
    {},
    {"bands": None, "channel": False},
    {"location": False, "channel": False},
    {"location": False, "channel": False, "bands": "bin"},
    {"location": False, "bands": None},
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(awake: bool = True, radius: int | None = None, **parts: object) -> DeformableAttention:
    """A small one, the same weights whatever the parts."""
    torch.manual_seed(0)
    module = awaken(DeformableAttention(6, 8, 2, radius=radius), 0.3)
    module.fusion = EnergyFusion(8, **parts)
    return awaken(module, 0.3) if awake else module


def test_size():
    """The design's budget is 2.8k; the published attention has none of it."""
    assert sum(parameter.numel() for parameter in EnergyFusion(72).parameters()) == 2981
    assert not any(key.startswith("fusion") for key in DeformableAttention(6, 8, 2).state_dict())


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize(("radius", "motion"), [(None, False), (1, False), (1, True), (None, True)])
def test_a_fresh_fusion_changes_nothing(parts, radius, motion):
    features = noise(2, 4, 6, 7, 9)
    flows = FrameMotion(noise(2, 3, 2, 7, 9, seed=2), noise(2, 3, 2, 7, 9, seed=3)) if motion else None
    fused = attention(awake=False, radius=radius, **parts)
    expected = fused(features, flows)
    assert (expected - features).abs().max() > 0.1
    fused.fusion = None
    assert_close(fused(features, flows), expected, atol=1e-5, rtol=0)
    changed = attention(radius=radius, **parts)(features, flows) - expected
    assert changed.abs().max() > 1e-3


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_every_new_parameter_learns_within_three_steps(parts):
    """No product has two factors that are zero at the start."""
    torch.manual_seed(0)
    module = DeformableAttention(6, 8, 2, fusion=EnergyFusion(8, **parts))
    features, wanted = noise(2, 4, 6, 16, 16), noise(2, 4, 6, 16, 16, seed=1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    learnt = set()
    for _ in range(3):
        optimizer.zero_grad()
        (module(features) - wanted).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        learnt |= {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
        optimizer.step()
    assert learnt == {name for name, _ in module.named_parameters()}


def test_energy_is_read_where_the_answer_is():
    """Two sources, sharp on their left and right half, and a flow of 8 px: the weight is that of what is fetched."""
    module = DeformableAttention(4, 4, 2, top_k=9, fusion=EnergyFusion(4, bands=None, channel=False))
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)  # all taps alike: only energy tells sources apart
    torch.nn.init.dirac_(module.embed.weight)
    torch.nn.init.eye_(module.value.weight)
    torch.nn.init.ones_(module.fusion.beta)
    sharp, left = noise(4, 16, 32), (torch.arange(32) < 16).float()
    features = torch.stack([sharp * left, torch.zeros_like(sharp), sharp * (1 - left)])[None]
    seen: list[FusedTarget] = []
    module.fusion.observe = seen.append
    step = torch.tensor([0.0, 8.0])[:, None, None].expand(1, 2, 2, 16, 32)
    with torch.no_grad():
        module(features)
        module(features, FrameMotion(following=step, preceding=step))  # from frame 1 both neighbours are 8 px off
    still, moved = seen[1].frame[0, 0], seen[4].frame[0, 0]  # of source 0 in target 1
    assert still[:, :13].min() > 0.95 and still[:, 19:].max() < 0.05
    assert moved[:, :5].min() > 0.95 and moved[:, 11:21].max() < 0.05
    assert_close(moved[:, 26:], torch.full((16, 6), 0.5))  # from beyond the border: nothing is flat


def test_sharp_sources_count_more():
    """Location: with a positive beta the weight of a source follows its own energy."""
    module = EnergyFusion(8, bands=None, channel=False).requires_grad_(False)
    module.beta.fill_(1.0)
    values = noise(1, 2, 8, 16, 16) * torch.tensor([0.5, 1])[:, None, None, None]
    detail = module.detail(values)[:, :, 0]
    y = module(values, torch.zeros(1, 2, 16, 16), values[:, 0], detail)
    share = (module.beta * detail).softmax(1)
    assert_close(y, (share[:, :, None] * values).sum(1))
    assert share[:, 1].mean() > 0.75
    assert (module.detail(torch.zeros_like(values)).abs() < 1e-4).all()  # flat, as beyond the border


def test_bands_replace_the_mean():
    module = EnergyFusion(8, location=False, channel=False).requires_grad_(False)
    module.gamma.fill_(1.0)
    fetched, own = noise(2, 3, 8, 15, 10), noise(2, 8, 15, 10, seed=1)
    result = module(fetched, torch.zeros(2, 3, 15, 10), own)
    assert_close(result, module.band(fetched, own), atol=1e-5, rtol=0)
    assert (result - fetched.mean(1)).abs().max() > 1e-2


def test_from_coarse_to_fine():
    """The channels are weighed by the spectrum of what location and bands have made."""
    module = awaken(EnergyFusion(8), 0.3).requires_grad_(False)
    fetched, own, relevance = noise(2, 3, 8, 15, 10), noise(2, 8, 15, 10, seed=1), noise(2, 3, 15, 10)
    detail = noise(2, 3, 15, 10, seed=2)
    whole = module(fetched, relevance, own, detail)
    channel, module.channel = module.channel, None
    assert_close(whole, channel(module(fetched, relevance, own, detail)))


@pytest.mark.parametrize("radius", [None, 1])
def test_clips_of_a_batch_do_not_meet_in_attention(radius):
    module, clips = attention(radius=radius).requires_grad_(False), noise(3, 3, 6, 9, 7)
    assert_close(module(clips)[1:2], module(clips[1:2]), atol=1e-5, rtol=1e-5)


def test_what_an_observer_sees():
    module = attention(awake=False).requires_grad_(False)
    features = noise(2, 5, 6, 8, 9)
    before = module(features)
    seen: list[FusedTarget] = []
    module.fusion.observe = seen.append
    assert torch.equal(module(features), before)
    assert [(one.target, one.sources) for one in seen] == [(j, tuple(i for i in range(5) if i != j)) for j in range(5)]
    for one in seen:
        assert_close(one.frame.sum(1), torch.ones(2, 8, 9))
        assert one.band.shape == (2, 4, 8, 5) and one.channel.shape == (2, 8)
    between = {1, 3}
    share = mean_weight_on(between, seen)
    assert share + mean_weight_on({0, 2, 4}, seen) == pytest.approx(1, abs=1e-5)
    by_hand = [one.frame[:, [one.sources.index(i) for i in between - {one.target}]].sum(1).mean() for one in seen]
    assert share == pytest.approx(float(sum(by_hand)) / 5, abs=1e-6)
    assert mean_weight_on([], seen) == 0


def test_mixed_precision():
    module, clip = attention().eval(), seeded_clip(1, 3, 6, 13, 9)
    exact = module(clip)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(clip)
    assert mixed.isfinite().all()
    # taps with nearly equal relevance may swap: compare in the mean
    assert (mixed.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    mixed.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    half = attention().bfloat16()(clip.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="does nothing: leave it out"):
        EnergyFusion(8, location=False, bands=None, channel=False)
    with pytest.raises(ValueError, match="no target was observed"):
        mean_weight_on({1}, [])
