"""Action blocks inside restoration networks: silent at the start, awake for any clip, and cheap."""

import pytest
import torch
from tiny import OFF, PUBLISHED, awaken, seeded_clip, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs import STDAN, STDANFreq
from archs.layers.atm import ATMBranch, DisplacementEncoder
from archs.layers.dtf import DTFBlock
from archs.layers.temporal import RADIUS, TEMPORAL, TemporalATM, TemporalDTF, temporal_block
from restore.checkpoint import load_to_start, save_network
from restore.cost import count_gmac, count_parameters

SMALL = {**PUBLISHED, **OFF}
SHAPES = [(1, 2, 8, 7, 5), (2, 3, 8, 4, 4), (1, 7, 8, 3, 9), (1, 1, 8, 1, 1)]

every_block = pytest.mark.parametrize("name", TEMPORAL)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(name: str) -> TemporalDTF | TemporalATM:
    """A block with nothing left at zero."""
    torch.manual_seed(0)
    return awaken(temporal_block(name, 8), 0.5).requires_grad_(False)


# ---- the blocks


@every_block
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_block_changes_nothing(name, shape):
    x = noise(*shape)
    assert torch.equal(temporal_block(name, 8)(x), x)


@every_block
@pytest.mark.parametrize("shape", SHAPES)
def test_any_length_and_size(name, shape):
    block, x = small(name), noise(*shape)
    result = block(x)
    assert result.shape == x.shape and result.isfinite().all()
    assert_close(block.train()(x[-1:]), result[-1:], atol=1e-4, rtol=1e-4)  # no statistics of batches


@every_block
def test_frames_meet_in_both_directions(name):
    block, x = small(name), noise(1, 5, 8, 6, 6)
    for there, here in ((0, 1), (4, 3)):
        changed = x.clone()
        changed[:, there] += 1
        assert (block(changed) - block(x))[:, here].abs().max() > 1e-3


def test_subtraction_of_a_still_clip_is_that_of_nothing():
    """Outside the clip stands its first or last frame, so that the ends of a still clip are as its middle."""
    x = noise(1, 1, 8, 6, 6).expand(-1, 5, -1, -1, -1)
    result = small("atm")(x)
    assert_close(result, result[:, 2:3].expand_as(result))


def test_taps_do_not_wrap_around():
    """With constant taps the block is a convolution over time of a mirrored clip, in which no end meets the other."""
    block = small("dtf")
    kernel = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4])
    block.filter.predictor.taps.weight.zero_()
    block.filter.predictor.taps.bias.copy_(kernel)
    block.filter.mixing.copy_(torch.stack([torch.eye(8), torch.zeros(8, 8)], dim=2))
    block.filter.norm = torch.nn.Identity()
    block.filter.scale.fill_(1)
    block.filter.bias.zero_()
    x = 1e-4 * noise(1, 6, 8, 1, 1)  # so small that all taps of the aggregation count alike
    mirrored = x[0, [2, 1, *range(6), 4, 3], :, 0, 0]
    ahead, behind = (F.pad(part, (0, 0, *ends)) / 9 for part, ends in ((mirrored[1:], (0, 1)), (mirrored[:-1], (1, 0))))
    enhanced = mirrored + ahead + behind  # a map of one pixel has one tap of nine within
    expected = x[0, :, :, 0, 0] + sum(kernel[k] * enhanced[4 - k : 10 - k] for k in range(2 * RADIUS + 1))
    assert_close(block(x)[0, :, :, 0, 0], expected, atol=1e-9, rtol=1e-4)


def test_bidirectional_aggregation_is_that_of_the_reversed_clip():
    torch.manual_seed(0)
    block = awaken(
        DTFBlock(8, 1, groups=8, sharing="paper", predictor="taps", norm="gn", bidirectional=True, radius=0), 0.5
    ).requires_grad_(False)
    gather = block.predictor.gather.weight  # (hidden, C + 9 + 9, 3, 1, 1): the same to both directions
    gather.copy_((gather + gather.flip(2)) / 2)
    gather[:, 8:17] = gather[:, 17:]
    block.mixing[..., 1] = 0  # a product with a complex number turns in time
    x = noise(1, 8, 5, 4, 4)
    assert_close(block(x.flip(2)).flip(2), block(x), atol=1e-5, rtol=1e-5)


def test_pointwise_displacements():
    """They have a weight for every displacement, and stand where the released convolutions stand."""
    encoder = DisplacementEncoder(4, "group", pointwise=True)
    assert encoder(noise(2, 81, 3, 5)).shape == (2, 4, 3, 5)
    assert encoder.convs[0][0].weight.shape == (4, 81, 1, 1)
    branch = ATMBranch(8, operation="mul", hidden=4, context=3, pointwise=True)
    assert branch(noise(1, 2, 8, 5, 4)).shape == (1, 2, 8, 5, 4)


def test_arguments_that_do_not_fit():
    with unchecked(), pytest.raises(ValueError, match="temporal='lstm' is none of null, dtf, atm"):
        STDANFreq(**SMALL, temporal="lstm")
    with pytest.raises(ValueError, match="bidirectional is for predictor='taps', not 'native'"):
        DTFBlock(16, 4, bidirectional=True)


# ---- in the network


@every_block
def test_the_network_starts_as_it_is_without(name, tmp_path):
    torch.manual_seed(0)
    plain = STDAN(**PUBLISHED).eval()
    save_network(tmp_path / "plain.safetensors", plain, {"type": "stdan", **PUBLISHED})
    network = STDANFreq(**SMALL, temporal=name).eval()
    fresh = load_to_start(network, tmp_path / "plain.safetensors")
    assert fresh and all(key.startswith("temporal.") for key in fresh)
    for frames in (2, 3):
        clip = seeded_clip(1, frames, 3, 16, 24)
        with torch.no_grad():
            assert torch.equal(network(clip), plain(clip))


@every_block
def test_every_new_parameter_learns_within_three_steps(name):
    torch.manual_seed(0)
    network = STDANFreq(**SMALL, temporal=name).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    asleep = {key for key, _ in network.named_parameters() if key.startswith("temporal.")}
    for step in range(3):
        optimizer.zero_grad()
        clip = seeded_clip(1, 2, 3, 16, 16, seed=step)
        (network(clip) - seeded_clip(1, 3, 3, 64, 64, seed=step)).abs().mean().backward()
        asleep -= {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not asleep
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_cost():
    """Of the published size, on 4 frames: a hundredth at most for DTF, a tenth for ATM."""
    network = STDANFreq().eval()
    whole = count_gmac(network, 4, 16, 16)
    for name, most in (("dtf", 0.01), ("atm", 0.1)):
        block = temporal_block(name, 64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(torch.zeros(1, 7, 64, 16, 16))
        assert 0 < counter.get_total_flops() / 2e9 < most * whole
        assert count_parameters(block) < 0.02 * count_parameters(network)
