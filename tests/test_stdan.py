"""STDAN: equal to the published network's numbers, and the laws that hold for any weights."""

import pytest
import torch
from safetensors.torch import load_file
from seeded import (
    GOLDEN,
    INPUTS,
    SHARED,
    TRUTH_A,
    assert_match,
    golden,
    published_parameters,
    published_shapes,
    uniform,
    value,
)
from tiny import COMPACT, PUBLISHED, awaken, seeded_clip, unchecked
from torch.testing import assert_close

from archs import STDAN
from archs.layers.blocks import BicubicUpsample, interleave, per_frame
from restore.checkpoint import load_published, published_key
from restore.losses import CharbonnierLoss


@pytest.fixture(scope="module")
def published() -> STDAN:
    """The published size with seeded weights."""
    network = STDAN().eval()
    load_published(network, published_parameters(), "seeded")
    return network


def small(**arguments: object) -> STDAN:
    """As published but narrow, with nothing left at zero."""
    torch.manual_seed(0)
    return awaken(STDAN(**{**PUBLISHED, **arguments})).eval().requires_grad_(False)


# ---- the published numbers


def test_size(published):
    assert sum(parameter.numel() for parameter in published.parameters()) == 8_292_843
    assert len(published.state_dict()) == 842


def test_stages_and_output(published):
    """Case c, stage by stage; from the choice of taps on, rounding may move a handful of pixels."""
    expected = golden("stdan")
    with torch.no_grad():
        features = published.encode(uniform(*INPUTS["c"]))
        assert_close(_reduced(features), expected["c.encoder"], atol=1e-4, rtol=1e-4)
        between = published.interpolate(features)
        assert_close(_reduced(between), expected["c.middle"], atol=1e-4, rtol=1e-4)
        sequence = published.aggregate(interleave(features, between))
        assert_match(_reduced(sequence), expected["c.aggregate"])
        decoded = per_frame(published.decoder, sequence)
        assert_match(_reduced(decoded), expected["c.decoder"])
        assert_match(per_frame(published.upsample, decoded), expected["c.y"])


def _reduced(stage: torch.Tensor) -> torch.Tensor:
    return stage.flatten(0, 1)[:, ::3, ::2, ::2]


def test_output(published):
    with torch.no_grad():
        result = published(uniform(*INPUTS["b"]))
    assert_match(result[..., ::5, ::5], golden("stdan")["b.y"])


def test_gradients(published):
    """Case a: output, loss, and the gradient norm of every parameter that two frames use."""
    norms = dict(line.split() for line in (GOLDEN / "stdan_grad_norms.txt").read_text().splitlines())
    assert len(norms) == 838
    published.zero_grad()
    result = published(uniform(*INPUTS["a"]))
    assert_match(result.detach()[..., ::5, ::5], golden("stdan")["a.y"], flipped=0.05)
    loss = CharbonnierLoss(reduction="sum")(result, uniform(*TRUTH_A))
    assert_close(loss.detach(), golden("stdan")["a.loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {published_key(key): parameter.grad for key, parameter in published.named_parameters()}
    assert {key for key, gradient in gradients.items() if gradient is not None} == norms.keys()
    for key, norm in norms.items():
        assert gradients[key].norm().item() == pytest.approx(float(norm), rel=1e-3, abs=1e-4), key
    published.zero_grad()


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the complete golden files are not in ../shared")
def test_golden_files_are_parts_of_the_complete_ones():
    complete = load_file(SHARED / "golden/stdan.safetensors")
    for case, (seed, shape) in INPUTS.items():
        assert torch.equal(uniform(seed, shape), complete[f"{case}.x"])
        step = 1 if case == "c" else 5
        assert torch.equal(complete[f"{case}.y"][..., ::step, ::step], golden("stdan")[f"{case}.y"])
    stages = load_file(SHARED / "golden/stdan_stages.safetensors")
    names = {"encoder": "feature_extraction", "middle": "lstfi", "aggregate": "stdfa", "decoder": "feature_recon"}
    for ours, theirs in names.items():
        stage = stages["lstfi.middle" if theirs == "lstfi" else f"{theirs}.out"]
        assert torch.equal(stage[:, ::3, ::2, ::2], golden("stdan")[f"c.{ours}"])
    gradients = load_file(SHARED / "golden/stdan_grad.safetensors")
    assert torch.equal(uniform(*TRUTH_A), gradients["gt"])
    keys = (SHARED / "golden/stdan_grad_keys.txt").read_text().split()
    norms = dict(line.split() for line in (GOLDEN / "stdan_grad_norms.txt").read_text().splitlines())
    assert list(norms) == keys
    assert_close(torch.tensor([float(norm) for norm in norms.values()]), gradients["grad_norm"], rtol=1e-6, atol=0)
    rows = [line.split("\t") for line in (SHARED / "specs/stdan_state_dict.tsv").read_text().splitlines()[1:]]
    assert {key: (shape, kind) for key, shape, _, kind in rows} == {
        key: ("x".join(map(str, shape)), kind) for key, (shape, kind) in published_shapes().items()
    }


def test_seeded_values():
    """Numbers of the random generator, so that a changed generator is told from a changed network."""
    assert uniform(*INPUTS["c"]).flatten()[:2].tolist() == [0.004263520240783691, 0.10556936264038086]
    assert value("conv_first.weight", (64, 3, 3, 3)).flatten()[:2].tolist() == [-0.38623046875, -0.023773193359375]


# ---- laws


@pytest.mark.parametrize("frames", [2, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (40, 16)])
@pytest.mark.parametrize("arguments", [PUBLISHED, COMPACT], ids=["published", "compact"])
def test_any_length_and_size(arguments, frames, size):
    network = small(**arguments)
    result = network(seeded_clip(1, frames, 3, *size))
    assert result.shape == (1, 2 * frames - 1, 3, 4 * size[0], 4 * size[1])
    assert result.isfinite().all()


@pytest.mark.parametrize("arguments", [PUBLISHED, COMPACT], ids=["published", "compact"])
def test_clips_of_a_batch_do_not_meet(arguments):
    network, clips = small(**arguments), seeded_clip(3, 3, 3, 16, 8)
    together = network(clips)
    for i in range(3):
        assert_match(together[i], network(clips[i : i + 1])[0])
    assert_match(network(clips[[2, 0, 1]]), together[[2, 0, 1]])
    changed = clips.clone()
    changed[1] = 0
    assert (network(changed)[1] - together[1]).abs().max() > 1e-3


def test_every_frame_reaches_every_frame():
    """The recurrence and the attention over all frames: nothing is cut off at a distance."""
    network, clip = small(), seeded_clip(1, 4, 3, 8, 8)
    before = network(clip)
    for i in range(4):
        changed = clip.clone()
        changed[:, i] = 1 - changed[:, i]
        assert ((network(changed) - before).abs().amax((0, 2, 3, 4)) > 1e-6).all()


def test_a_radius_that_holds_all_frames_changes_nothing():
    clip = seeded_clip(2, 2, 3, 8, 16)  # three frames come out
    everywhere = small()(clip)
    assert torch.equal(small(temporal_radius=2)(clip), everywhere)
    assert (small(temporal_radius=1)(clip) - everywhere).abs().max() > 1e-4


@pytest.mark.parametrize("radius", [1, 2])
def test_attention_within_a_radius(radius):
    network = small(temporal_radius=radius)
    features = seeded_clip(1, 6, 8, 8, 8)
    changed = features.clone()
    changed[:, 2] += seeded_clip(1, 8, 8, 8, seed=1)
    reached = (network.aggregate(changed) - network.aggregate(features)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert reached.tolist() == [abs(i - 2) <= radius for i in range(6)]


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "light"])
@pytest.mark.parametrize("motion_prior", [None, "correlation"])
def test_training_starts_at_the_upscaled_input(upsampler, motion_prior):
    torch.manual_seed(0)
    network = STDAN(**PUBLISHED, skip="bicubic", motion_prior=motion_prior, upsampler=upsampler).eval()
    clip = seeded_clip(2, 3, 3, 16, 16)
    with torch.no_grad():
        result = network(clip)
        merged = (clip[:, :-1] + clip[:, 1:]) / 2 if motion_prior is None else network.motion(clip).merge(clip)
    assert torch.equal(result[:, ::2], per_frame(BicubicUpsample(4), clip))
    assert torch.equal(result[:, 1::2], per_frame(BicubicUpsample(4), merged))


def test_the_skip_is_added():
    """With the same weights the network with a skip gives the upscaled input more than the one without."""
    plain, skipping = small(), small(skip="bicubic")
    skipping.load_state_dict(plain.state_dict())
    clip = seeded_clip(1, 3, 3, 8, 8)
    upscaled = per_frame(BicubicUpsample(4), interleave(clip, (clip[:, :-1] + clip[:, 1:]) / 2))
    assert_close(skipping(clip) - plain(clip), upscaled, atol=1e-5, rtol=0)


def test_motion_moves_where_features_are_read():
    """A flow of zero is the published network; any other changes what is read."""
    network = small(motion_prior="correlation")
    clip = seeded_clip(1, 2, 3, 16, 16)
    still = torch.zeros(1, 1, 2, 16, 16)
    features = network.encode(clip)
    motion = network.motion(clip)
    there = type(motion)(still, still, motion.mix)
    assert_close(network.interpolate(features, there), network.interpolate(features), atol=1e-5, rtol=1e-5)
    moved = type(motion)(still - 2, still + 2, motion.mix)
    assert (network.interpolate(features, moved) - network.interpolate(features)).abs().max() > 1e-2


# ---- refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 3, 8, 8), "STDAN needs at least 2 frames, not 1"),
        ((1, 2, 3, 8, 12), "STDAN needs height and width divisible by 8, not 8x12"),
        ((1, 2, 3, 7, 8), "divisible by 8, not 7x8"),
        ((1, 2, 1, 8, 8), r"STDAN takes RGB clips \(B, T, 3, h, w\), not \(1, 2, 1, 8, 8\)"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 9}, "embed_dim=9 does not divide by heads=2"),
        ({"channels": 9}, "channels=9 does not divide by deform_groups=2"),
        ({"embed_dim": 9, "heads": 3}, "embed_dim=9 does not divide by deform_groups=2"),
        ({"top_k": 0}, "top_k=0 is not within 1..9"),
        ({"top_k": 10}, "top_k=10 is not within 1..9"),
        ({"skip": "bilinear"}, "skip='bilinear' is none of null, bicubic"),
        ({"motion_prior": "raft"}, "motion_prior='raft' is none of null, correlation"),
        ({"upsampler": "nearest"}, "upsampler='nearest' is none of pixelshuffle, light"),
        ({"exchange": "propagation"}, "set motion_prior='correlation'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        STDAN(**{**PUBLISHED, **arguments})


@pytest.mark.parametrize(
    ("arguments", "multiple"),
    [({}, 8), ({"window": 4}, 4), ({"window": 2, "levels": 4}, 8), ({"window": 2, "motion_prior": "correlation"}, 4)],
)
def test_multiple_of_follows_the_arguments(arguments, multiple):
    network = small(**arguments)
    assert network.multiple_of == multiple
    assert network(seeded_clip(1, 2, 3, multiple, 2 * multiple)).shape[-2:] == (4 * multiple, 8 * multiple)
