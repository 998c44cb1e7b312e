"""Spectrum-guided alignment: signs and orders of what guides, the algebra of time, and a start that changes nothing."""

import json

import pytest
import torch
from tiny import awaken, run_python, seeded_clip, unchecked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs import STDAN
from archs.layers.deform import DeformOffsets, ModulatedDeformConv, OffsetGuidance
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.frequency_align import (
    MOTIONS,
    ClipSpectra,
    PairMotion,
    SpectrumGuidance,
    describe_pair,
    log_amplitude_ratio,
)
from archs.layers.motion_prior import MiddleMotion
from archs.layers.spectral import rfft2

CHANNELS, GROUPS, LEVELS = 8, 2, 3
KINDS = {
    "full": {}, "guide": {"prior": False}, "prior": {"guide": False}, "surface": {"motion": "surface"},
    "fcvsr": {"motion": "fcvsr"},
}  # fmt: skip


def guidance(kind: str = "full", **arguments: object) -> SpectrumGuidance:
    torch.manual_seed(0)
    return SpectrumGuidance(CHANNELS, GROUPS, LEVELS, **{**KINDS[kind], **arguments})


def interpolation(*, awake: bool = False) -> FeatureInterpolation:
    torch.manual_seed(1)
    network = FeatureInterpolation(CHANNELS, LEVELS, GROUPS)
    return awaken(network, 0.05) if awake else network


def noise(*shape: int, seed: int = 0) -> Tensor:
    return seeded_clip(*shape, seed=seed) - 0.5


def pyramid(x: Tensor) -> list[Tensor]:
    """A clip of features (B, T, C, h, w) at 1, 1/2 and 1/4 of the size, odd ones rounded up."""
    levels = [x]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1].flatten(0, 1), 2, ceil_mode=True).unflatten(0, x.shape[:2]))
    return levels


def pair_of(module: SpectrumGuidance, x: Tensor) -> tuple[ClipSpectra, ClipSpectra]:
    spectra = module.spectra(pyramid(x))
    return spectra.frames(slice(-1)), spectra.frames(slice(1, None))


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Periodic noise of a few pixels' size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return sum(x.roll((dy, dx), (-2, -1)) for dy in range(-1, 2) for dx in range(-1, 2)) / 3


def translated(shift: tuple[int, int], size: tuple[int, int] = (32, 32)) -> Tensor:
    first = smooth(1, CHANNELS, *size)
    return torch.stack([first, first.roll(shift, (-2, -1))], dim=1)


# ---- signs and orders (where deformable convolutions sample)


def identity_convolution() -> ModulatedDeformConv:
    """A DCN that copies what its central tap reads; at the start taps are modulated by 0.5."""
    convolution = ModulatedDeformConv(CHANNELS, GROUPS).requires_grad_(False)
    convolution.weight.zero_()
    convolution.weight[:, :, 1, 1] = 2 * torch.eye(CHANNELS)
    return convolution


@pytest.mark.parametrize("way", ["base", "offset"])
def test_the_offset_that_undoes_a_shift(way):
    """b(p) = a(p - s) is a sampled at -s, (dy, dx) interleaved; the swapped order is another picture."""
    x = noise(1, CHANNELS, 16, 20)
    shift = (3, -2)
    for order, fits in ((shift, True), (shift[::-1], False)):
        convolution, known = identity_convolution(), None
        vector = -torch.tensor(order).float()
        if way == "base":
            known = OffsetGuidance(base=vector[:, None, None].expand(1, 2, 16, 20))
        else:
            convolution.offsets.conv.bias[: GROUPS * 18] = vector.repeat(GROUPS * 9)
        sampled = convolution(x, torch.zeros_like(x), guidance=known)
        error = (sampled - x.roll(shift, (-2, -1)))[..., 4:-4, 4:-4].abs().max()
        assert (error < 1e-5) == fits


def test_gain_and_shift_meet_their_channels():
    offsets = DeformOffsets(CHANNELS, GROUPS).requires_grad_(False)
    offsets.conv.bias.copy_(torch.linspace(-1, 1, GROUPS * 27))
    x = noise(2, CHANNELS, 4, 5)
    gain, shift = noise(2, GROUPS * 18, seed=1), noise(2, GROUPS * 9, seed=2)
    plain, modulation = offsets(x)
    moved, remodulated = offsets(x, guidance=OffsetGuidance(gain=gain, shift=shift))
    taps = plain - offsets.conv.bias[: GROUPS * 18].view(GROUPS, 9, 2, 1, 1)
    expected = (plain - taps) * (1 + gain.view(2, GROUPS, 9, 2, 1, 1)) + taps
    assert_close(moved, expected)
    assert_close(remodulated.logit(), modulation.logit() + shift.view(2, GROUPS, 9, 1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [(4, -8), (-6, 2)])
def test_the_prior_of_a_translation(shift):
    module = guidance("prior")
    for level in module.levels:
        nn.init.ones_(level.prior)
    first, second = module(*pair_of(module, translated(shift)))
    motion = module.pair_motion(*pair_of(module, translated(shift)))
    half = torch.tensor(shift)[None, :, None, None] / 2
    assert motion.confidence.min() > 0.5
    for level in range(LEVELS):
        trust = motion.at((32 >> level, 32 >> level), level).confidence
        for sign, known in ((-1, first[level]), (1, second[level])):
            assert known.addition is known.gain is known.shift is None
            expected = sign * trust * half / 2**level
            assert_close(known.base, expected.expand_as(known.base), atol=0.15 / 2**level, rtol=0)


# ---- the algebra of time


def test_the_branches_meet_at_any_time():
    module = awaken(guidance())
    for level in module.levels:
        nn.init.ones_(level.prior)
    pair = pair_of(module, translated((3, -5)))
    motion = module.pair_motion(*pair)
    away = motion.confidence * motion.vector
    for tau in (0.0, 0.3, 0.5, 1.0):
        first, second = module(*pair, tau=tau)
        assert_close(first[0].base - second[0].base, -away, atol=1e-5, rtol=0)
        assert_close(first[0].base, -tau * away, atol=1e-5, rtol=0)
        swapped = module(*pair[::-1], tau=1 - tau)
        for ours, theirs in zip((*first, *second), (*swapped[1], *swapped[0]), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_toward_another_frame_is_the_whole_way():
    """What deformable attention needs: ordered pairs of a target and its sources, from spectra made once."""
    module = awaken(guidance())
    spectra = module.spectra(pyramid(smooth(2, 4, CHANNELS, 16, 16)))
    sources = [0, 1, 3]
    known = module.toward(spectra.frames(sources), spectra.frames([2] * 3))
    assert len(known) == LEVELS and known[0].addition.shape == (6, CHANNELS, 16, 16)
    alone = module.toward(spectra.frames([3]), spectra.frames([2]))
    assert_close(known[0].addition.unflatten(0, (2, 3))[:, 2], alone[0].addition, atol=1e-5, rtol=1e-5)
    forth, _ = module(spectra.frames([3]), spectra.frames([2]), tau=1.0)
    assert_close(forth[1].base, alone[1].base)


# ---- what pairs are told


def descriptor(a: Tensor, b: Tensor) -> Tensor:
    still = PairMotion(torch.zeros(len(a), 2, *a.shape[-2:]), torch.ones(len(a), 1, *a.shape[-2:]))
    return describe_pair(rfft2(a), rfft2(b), a.shape[-1], still)


def test_roles_swapped():
    a, b = smooth(2, 16, 32, 32), smooth(2, 16, 32, 32, seed=1)
    motion = PairMotion(noise(2, 2, 32, 32), seeded_clip(2, 1, 32, 32))
    there = describe_pair(rfft2(a), rfft2(b), 32, motion)
    back = describe_pair(rfft2(b), rfft2(a), 32, motion.reversed())
    sign = torch.tensor([-1.0, -1, 1, 1] + [-1] * 8 + [1] * 8)
    assert there.shape == (2, 20)
    assert_close(there, sign * back, atol=1e-5, rtol=1e-5)
    assert_close(log_amplitude_ratio(rfft2(a), rfft2(b)), -log_amplitude_ratio(rfft2(b), rfft2(a)))


def test_coherence_knows_a_shifted_frame_from_another_one():
    a = smooth(1, 16, 32, 32)
    coherence = {
        "shifted": descriptor(a, a.roll((5, -9), (-2, -1))), "dimmed": descriptor(a, 0.1 * a),
        "other": descriptor(a, smooth(1, 16, 32, 32, seed=1)),
    }  # fmt: skip
    assert_close(coherence["shifted"][0, -8:], torch.ones(8), atol=1e-4, rtol=0)
    assert_close(coherence["dimmed"][0, -8:], torch.ones(8), atol=1e-4, rtol=0)
    assert coherence["other"][0, -8:].mean() < 0.5


def test_the_blurred_frame_has_less_of_the_high_bands():
    a = noise(1, 16, 32, 32)
    blurred = F.avg_pool2d(F.pad(a, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    ratio = descriptor(a, blurred)[0, 4:12]
    assert ratio[0].abs() < 0.1 and (ratio[2:] < -0.5).all()
    assert_close(descriptor(a, 2 * a)[0, 4:12], torch.full((8,), 2.0).log(), atol=0.01, rtol=0)


def maps(kind: str, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    module = MOTIONS[kind](CHANNELS)
    return module(rfft2(x[:, 0]), rfft2(x[:, 1]), x.shape[-2:])


@pytest.mark.parametrize(("kind", "moves"), [("filter", True), ("fcvsr", False), ("surface", False)])
def test_maps_that_move_with_the_picture(kind, moves):
    """Both frames rolled: what is said about their content must move along; a correlation surface stays."""
    x = translated((2, 3))
    before, after = maps(kind, x), maps(kind, x.roll((7, -4), (-2, -1)))
    error = (after - before.roll((7, -4), (-2, -1))).abs().mean() / before.abs().mean()
    assert (error < 1e-3) == moves
    if kind == "surface":
        assert_close(after, before, atol=1e-4, rtol=1e-3)


def test_contrast_does_not_matter():
    module, x = awaken(guidance()), smooth(1, 2, CHANNELS, 32, 32)
    for ours, dim in zip(*(module(*pair_of(module, v))[0] for v in (x, 0.2 * x)), strict=True):
        for a, b in zip(ours, dim, strict=True):
            assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_blank_frames():
    module = awaken(guidance())
    x = torch.zeros(1, 2, CHANNELS, 16, 16, requires_grad=True)
    first, second = module(*pair_of(module, x))
    parts = [part for known in (*first, *second) for part in known]
    assert all(part.isfinite().all() for part in parts)
    assert max(float(known.base.detach().abs().max()) for known in (*first, *second)) < 1e-3
    sum(part.sum() for part in parts).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters()) and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "surface"])
@pytest.mark.parametrize("contrast", [0.0, 1e-8, 1e-4])
def test_gradients_are_bounded_where_one_frame_is_flat(kind, contrast):
    """A phase's derivative is 1 / amplitude: it once ended a training with gradients of 1e22."""
    module = awaken(guidance(kind))
    x = noise(1, 2, CHANNELS, 32, 32)
    x[:, 0] *= contrast
    x.requires_grad_()
    first, second = module(*pair_of(module, x))
    sum(part.square().sum() for known in (*first, *second) for part in known).backward()
    flat, textured = x.grad.abs().amax((0, 2, 3, 4))
    assert 0 < textured < 1e3 and flat < 1e6


# ---- in feature interpolation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_guidance_changes_nothing(kind, moving, training):
    network = interpolation(awake=True).train(training).requires_grad_(False)
    x = noise(2, 3, CHANNELS, 16, 24)
    motion = None
    if moving:
        to_later = noise(2, 2, 2, 16, 24, seed=3)
        motion = MiddleMotion(-to_later, to_later, torch.full((2, 2, 1, 16, 24), 0.5))
    before = network(x, motion)
    network.guidance = guidance(kind)
    assert_close(network(x, motion), before, atol=1e-6, rtol=0)  # an addition may change the layout in memory
    awaken(network.guidance, 0.1)
    assert (network(x, motion) - before).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_parameter_learns_within_three_steps(kind):
    """From scratch, where offsets are zero, too: no two factors of a product start at zero."""
    network = interpolation()
    network.guidance = guidance(kind)
    x, target = smooth(1, 3, CHANNELS, 16, 16), noise(1, 2, CHANNELS, 16, 16, seed=5)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    reached: set[str] = set()
    for _ in range(3):
        optimiser.zero_grad()
        (network(x) - target).square().mean().backward()
        reached |= {n for n, p in network.guidance.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad.isfinite().all() for p in network.guidance.parameters())
        optimiser.step()
    assert reached == {name for name, _ in network.guidance.named_parameters()}


def test_guidance_of_what_flows_leave():
    """Along the true flows nothing is left to say about motion: the prior fades."""
    network = interpolation().requires_grad_(False)
    module = network.guidance = guidance("prior")
    x = translated((4, -6))
    half = torch.tensor([2.0, -3.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 32, 32)
    for level in module.levels:
        nn.init.ones_(level.prior)
    levels = pyramid(x)
    still, _ = network._guidance(levels, None)
    followed, _ = network._guidance(levels, MiddleMotion(-half, half, torch.full((1, 1, 1, 32, 32), 0.5)))
    assert still[0].base.abs().max() > 2
    assert followed[0].base.abs().max() < 0.3


def test_the_hidden_state_is_left_alone():
    network = interpolation(awake=True).requires_grad_(False)
    network.guidance = awaken(guidance(), 0.1)
    seen = []
    network.step.align.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments)))
    network(noise(1, 3, CHANNELS, 16, 16))
    assert seen == [3, 3]  # two pyramids and the flows


def test_items_of_a_batch_are_independent():
    network = interpolation(awake=True).requires_grad_(False)
    network.guidance = awaken(guidance(), 0.1)
    x = smooth(3, 3, CHANNELS, 16, 24)
    assert_close(network(x)[1:2], network(x[1:2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(45, 79), (4, 4)])
def test_odd_and_tiny_sizes(kind, size):
    module = awaken(guidance(kind)).train()
    first, second = module(*pair_of(module, noise(1, 2, CHANNELS, *size)))
    for level, known in enumerate(first + second):
        h, w = (-(-n // 2 ** (level % LEVELS)) for n in size)
        for part, shape in ((known.addition, (1, CHANNELS, h, w)), (known.base, (1, 2, h, w))):
            assert part is None or (part.shape == shape and part.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind):
    """Autocast and weights in bf16: finite, of the usual types, and close."""
    network = interpolation(awake=True).requires_grad_(False)
    network.guidance = awaken(guidance(kind), 0.05)
    x = smooth(1, 3, CHANNELS, 48, 80)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = network(x)
    result = network.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    for y in (cast, result):
        assert y.isfinite().all()
        assert (y.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


# ---- weights, sizes, graphs


def test_names_of_weights():
    """The published network keeps its names; what is new has names of its own, and survives a round trip."""
    published = STDAN(channels=CHANNELS, embed_dim=8, heads=2, encoder_depths=(1,), decoder_depths=(1,), levels=LEVELS,
                      deform_groups=GROUPS)  # fmt: skip
    before = set(published.state_dict())
    published.interpolate.guidance = awaken(guidance())
    state = published.state_dict()
    assert before < set(state)
    assert all(name.startswith("interpolate.guidance.") for name in set(state) - before)
    fresh = guidance()
    fresh.load_state_dict(published.interpolate.guidance.state_dict())
    x = smooth(1, 2, CHANNELS, 16, 16)
    ours, theirs = (m(*pair_of(m, x))[0][0] for m in (fresh, published.interpolate.guidance))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_size_and_cost():
    """At 64 channels: 28.5k parameters a level, and less than the 0.81 GMAC that were expected for 4 frames 64x64."""
    module = SpectrumGuidance(64, 8).requires_grad_(False)
    assert sum(p.numel() for p in module.parameters()) == 3 * 28_473
    assert sum(p.numel() for p in SpectrumGuidance(64, 8, guide=False).parameters()) == 3
    with FlopCounterMode(display=False) as counter:
        module(*pair_of(module, noise(1, 4, 64, 64, 64)))
    assert counter.get_total_flops() / 2e9 < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guide": False, "prior": False}, "guides nothing: leave it out"),
        ({"motion": "raft"}, "motion='raft' is none of filter, surface, fcvsr"),
        ({"window": 30}, "a multiple of 4 is needed"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        SpectrumGuidance(CHANNELS, GROUPS, **arguments)


GRAPHS = """
import json
import torch
from tiny import awaken
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.frequency_align import SpectrumGuidance

torch.manual_seed(0)
network = awaken(FeatureInterpolation(8, 2, 2, guidance=SpectrumGuidance(8, 2, 2))).eval().requires_grad_(False)
x = torch.randn(1, 2, 8, 16, 16)
exported = torch.export.export(network, (x,)).module()
torch._dynamo.reset()
explained = torch._dynamo.explain(network)(x)
print(json.dumps({"error": float((exported(x) - network(x)).abs().max()), "breaks": explained.graph_break_count}))
"""


def test_graphs():
    """`torch.export` gives the same numbers, `torch.compile` sees one graph."""
    process = run_python(GRAPHS)
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["error"] < 1e-4 and report["breaks"] == 0
