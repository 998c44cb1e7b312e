"""Enhancement in space and frequency: nothing at the start, shifts in and out, any size, any precision."""

from collections.abc import Callable

import pytest
import torch
from tiny import awaken, relative_error, seeded_clip, unchecked
from torch import Tensor, nn

from archs.layers.global_filter import RadialFilter
from archs.layers.multi_frequency import (
    FILTERS,
    EnergyFrequencyEnhancement,
    FreqSpatialBlock,
    FrequencyEnhancement,
    PlainEnhancement,
    SpatialFrequencyEnhancement,
    SpectralConv1x1,
)
from archs.layers.spectral import irfft2, rfft2

CHANNELS = 8
MODULES: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: FreqSpatialBlock(CHANNELS),
    "block, magnitude": lambda: FreqSpatialBlock(CHANNELS, magnitude=True),
    "radial": lambda: FrequencyEnhancement(CHANNELS),
    "polar": lambda: FrequencyEnhancement(CHANNELS, filter="polar"),
    "global": lambda: FrequencyEnhancement(CHANNELS, filter="global", grid=(16, 24)),
    "plain": lambda: PlainEnhancement(CHANNELS),
}
SIZES = [(32, 32), (33, 47), (45, 79)]

every_module = pytest.mark.parametrize("name", MODULES)
every_size = pytest.mark.parametrize("size", SIZES)


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def learnt(name: str) -> nn.Module:
    """Nothing left at zero."""
    return awaken(fresh(name), 0.1)


def features(*shape: int, seed: int = 0) -> Tensor:
    return 2 * seeded_clip(*shape, seed=seed) - 1


def roll(x: Tensor) -> Tensor:
    return x.roll((5, -7), (-2, -1))


# ---- what all share


@every_module
@every_size
def test_fresh_is_the_identity(name, size):
    x = features(2, CHANNELS, *size)
    with torch.no_grad():
        assert (fresh(name)(x) - x).abs().max() < 1e-6


@every_module
@every_size
def test_any_size(name, size):
    module, x = learnt(name), features(2, CHANNELS, *size)
    with torch.no_grad():
        result = module(x)
    assert result.shape == x.shape and result.isfinite().all()
    assert relative_error(result, x) > 0.01


@every_module
def test_every_parameter_learns_within_three_steps(name):
    """No product of two zeros: what is silent wakes up."""
    module = fresh(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, wanted = features(2, CHANNELS, 16, 24), features(2, CHANNELS, 16, 24, seed=1)
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (module(x) - wanted).square().mean().backward()
        reached |= {key for key, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
        optimizer.step()
    assert {key for key, _ in module.named_parameters()} == reached


@every_module
def test_images_of_a_batch_do_not_meet(name):
    module, x = learnt(name).train(), features(3, CHANNELS, 16, 21)
    with torch.no_grad():
        alone = torch.cat([module(image[None]) for image in x])
        assert (module(x) - alone).abs().max() < 1e-5


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype(name, dtype):
    module, x = learnt(name), features(1, CHANNELS, 45, 79)
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            result = module(x.to(dtype))
    assert result.dtype == dtype and result.isfinite().all()
    assert relative_error(result, exact) < 0.02


@every_module
def test_bf16_weights(name):
    module, x = learnt(name), features(1, CHANNELS, 33, 47)
    with torch.no_grad():
        exact = module(x)
        result = module.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative_error(result, exact) < 0.03


@every_module
def test_weights_survive(name):
    module, other, x = learnt(name), fresh(name), features(1, CHANNELS, 16, 24)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), module(x))
    assert all(tensor.is_floating_point() for tensor in module.state_dict().values())


@every_module
def test_flat_images(name):
    """A spectrum of zeros has neither phase nor energy: gradients stay finite."""
    x = torch.zeros(1, CHANNELS, 16, 16, requires_grad=True)
    learnt(name)(x).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["block", "block, magnitude", "radial", "polar"])
def test_channels_last(name):
    """As the training loop lays out images and weights."""
    module, x = learnt(name), features(2, CHANNELS, 16, 24)
    with torch.no_grad():
        expected = module(x)
        result = module.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert (result - expected).abs().max() < 1e-5


# ---- shifts


def global_branch(filter: str) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    module = SpatialFrequencyEnhancement(CHANNELS, FILTERS[filter](CHANNELS, (16, 24)))
    return awaken(module, 0.1)._global


def spectral_mix(groups: int) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    mix = SpectralConv1x1(CHANNELS, groups)
    return lambda x: irfft2(mix(rfft2(x)), x.shape[-2:])


def energies(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return awaken(EnergyFrequencyEnhancement(CHANNELS), 0.1)(x)


def magnitudes(x: Tensor) -> Tensor:
    block = learnt("block, magnitude")
    for parameter in block.spatial.parameters():  # which pads with zeros
        nn.init.zeros_(parameter)
    return block(x)


@every_size
@pytest.mark.parametrize(
    "part",
    [
        *(pytest.param(global_branch(name), id=f"global branch, {name}") for name in FILTERS),
        pytest.param(spectral_mix(1), id="mix"),
        pytest.param(spectral_mix(4), id="mix in groups"),
        pytest.param(energies, id="energies"),
        pytest.param(magnitudes, id="magnitudes"),
    ],
)
def test_shifts_commute(part, size):
    x = features(1, CHANNELS, *size)
    with torch.no_grad():
        result = part(x)
        assert (part(roll(x)) - roll(result)).abs().max() < 1e-5
        assert relative_error(roll(result), result) > 0.05


def test_a_free_mix_of_parts_would_mirror():
    """Why the product is complex: real and imaginary parts mixed at will answer to a shift with its opposite."""
    x = features(1, CHANNELS, 33, 47)
    spectrum = rfft2(x)
    mirrored = irfft2(torch.complex(spectrum.real, -spectrum.imag), x.shape[-2:])
    assert (mirrored - x.flip(-2, -1).roll((1, 1), (-2, -1))).abs().max() < 1e-5


# ---- what they are for


def test_the_mix_is_a_convolution_of_parts():
    """2C -> 2C in groups, each of the real and imaginary parts of its channels."""
    torch.manual_seed(0)
    mix, x = SpectralConv1x1(CHANNELS, 4), rfft2(features(1, CHANNELS, 9, 12))
    by_group = [part.unflatten(1, (4, 2)) for part in (x.real, x.imag)]
    parts = torch.stack(by_group, dim=2).flatten(1, 3)  # group, part, channel
    a, b = mix.weight.unbind(-1)
    weight = torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1).flatten(0, 1)[..., None, None]
    result = nn.functional.conv2d(parts, weight, groups=4).unflatten(1, (4, 2, 2))
    expected = torch.complex(result[:, :, 0], result[:, :, 1]).flatten(1, 2)
    assert (mix(x) - expected).abs().max() < 1e-5


def test_a_filter_reaches_the_whole_image():
    """One pixel changes the farthest one, which no 13x13 kernel does."""
    torch.manual_seed(0)
    module = awaken(SpatialFrequencyEnhancement(CHANNELS, RadialFilter(CHANNELS)), 0.1)
    x = features(1, CHANNELS, 48, 48)
    moved = x.clone()
    moved[..., 0, 0] += 1
    with torch.no_grad():
        assert (module(moved) - module(x))[..., 24, 24].abs().min() > 1e-6


def test_gains_follow_from_sharpness():
    """Equal means, other bands: a plain squeeze would see no difference."""
    torch.manual_seed(0)
    module = awaken(EnergyFrequencyEnhancement(CHANNELS), 0.3)
    sharp = features(1, CHANNELS, 32, 32)
    spectrum = rfft2(sharp)
    spectrum[..., 8:24, :] = 0
    soft = irfft2(spectrum, (32, 32))
    with torch.no_grad():
        gains = [(module(x) / x).flatten(2).median(-1).values for x in (sharp, soft)]
    assert (sharp.mean((-2, -1)) - soft.mean((-2, -1))).abs().max() < 1e-6
    assert all((gain > 0).all() and (gain < 2).all() for gain in gains)
    assert (gains[0] - gains[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("filter", "count"), [("radial", 32_369), ("polar", 35_953), ("global", 101_489)])
def test_parameters(filter, count):
    assert sum(p.numel() for p in FrequencyEnhancement(64, filter=filter).parameters()) == count


def test_the_control_is_as_large():
    count = sum(p.numel() for p in PlainEnhancement(64).parameters())
    assert count == 36_960 and 32_369 <= count <= 1.15 * 32_369


def test_bad_arguments():
    with unchecked():
        with pytest.raises(ValueError, match="filter='bands' is none of radial, polar, global"):
            FrequencyEnhancement(CHANNELS, filter="bands")
        with pytest.raises(ValueError, match="groups=4"):
            FrequencyEnhancement(6)
