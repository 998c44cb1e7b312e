"""DTF-Net: the published numbers, sizes and keys, and the laws of a classifier of clips."""

import pytest
import torch
from safetensors.torch import load_file
from seeded import SHARED, value
from tiny import awaken, relative_error, seeded_clip, unchecked
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs.action.dtf_net import MEAN, STD, DTFNet, published_key
from archs.layers.dtf import DTFBlock


def small(*, seed: int = 0, **arguments: object) -> DTFNet:
    """Narrow and shallow, with nothing left at zero."""
    torch.manual_seed(seed)
    arguments = {"width": 8, "blocks": (2, 1, 1, 1), "classes": 5, "clip_length": 16, "norm": "gn", **arguments}
    network = awaken(DTFNet(**arguments), 0.5).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    network(seeded_clip(2, network.layer1[0].dtf.clip_length * 4, 3, 64, 64, seed=1))  # statistics; else it explodes
    return network.eval()


# ---- the published numbers


def table(name: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of each entry of a published state_dict."""
    path = SHARED / f"specs/{name}.tsv"
    if not path.is_file():
        pytest.skip("the tables of published keys are not in ../shared")
    rows = (line.split("\t") for line in path.read_text().splitlines()[1:])
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n) for _, key, shape, *_ in rows}


@pytest.fixture(scope="module")
def published() -> tuple[DTFNet, dict[str, Tensor]]:
    """ResNet-50 with seeded weights, and the golden file."""
    path = SHARED / "golden/dtf_net_r50.safetensors"
    if not path.is_file():
        pytest.skip("the complete golden files are not in ../shared")
    file, network = load_file(path), DTFNet().eval().requires_grad_(False)
    weights = {key: value(key, shape, gain=2.0) for key, shape in table("dtf_state_dict").items()}
    weights |= {key: torch.full_like(tensor, 1 / len(tensor)) for key, tensor in weights.items() if "_cor" in key}
    weights |= {key.removeprefix("state."): tensor for key, tensor in file.items() if key.startswith("state.")}
    network.load_published({"model": {f"module.{key}": tensor for key, tensor in weights.items()}})
    return network, file


def test_stages_and_logits(published):
    network, file = published
    stages = network.stages(file["x"].float())
    for i, stage in enumerate(stages, 1):
        expected = file[f"layer{i}"]
        assert_close(stage[:, : expected.shape[1]], expected, atol=1e-3, rtol=0)
    assert_close(stages[-1].mean((2, 3, 4)), file["pool"], atol=1e-4, rtol=0)
    clip = file["x"].float().transpose(1, 2) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert_close(network(clip), file["y"], atol=1e-3, rtol=0)


def test_the_filters_take_part_in_the_published_numbers(published):
    """Without them the logits are others, as the golden file's description says."""
    network, file = published
    scales = {name: block.scale.clone() for name, block in network.named_modules() if isinstance(block, DTFBlock)}
    for name in scales:
        network.get_submodule(name).scale.zero_()
    assert (network.fc(network.stages(file["x"].float())[-1].mean((2, 3, 4))) - file["y"]).abs().max() > 0.5
    for name, scale in scales.items():
        network.get_submodule(name).scale.copy_(scale)


def test_published_keys(published):
    network, _ = published
    expected = table("dtf_state_dict")
    assert {key: tuple(tensor.shape) for key, tensor in network.export_published().items()} == expected


@pytest.mark.parametrize(
    ("depth", "frames", "size", "parameters", "trainable", "gmac"),
    [
        (50, 16, 224, 28.95, 28.82, 18.71),
        (50, 16, 256, 28.95, 28.82, 24.44),
        (50, 64, 256, 50.67, 50.12, 100.35),
        (101, 16, 224, 52.07, 51.77, 34.55),
        (101, 64, 256, 93.28, None, 185.81),
    ],
)
def test_parameters_and_cost(depth, frames, size, parameters, trainable, gmac):
    """The table measured for the published code, in millions and 10^9 (a complex product counts once)."""
    with FakeTensorMode(), unchecked(), FlopCounterMode(display=False) as counter:
        network = DTFNet(depth=depth, clip_length=frames).eval()
        network(torch.zeros(1, frames, 3, size, size))
        ours = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        correlations = sum(9 * block.dim * frames // 4 for block in network.modules() if isinstance(block, DTFBlock))
    assert ours == pytest.approx(trainable or parameters - correlations / 1e6, abs=0.006)
    assert ours + correlations / 1e6 == pytest.approx(parameters, abs=0.006)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.002)


# ---- published state_dicts


def test_keys_of_a_filter():
    assert published_key("layer3.22.dtf.mixing") == "layer3.22.dtf_blk.linear1.complex_weight"
    assert published_key("layer1.0.dtf.predictor.weight") == "layer1.0.dtf_blk.filter_g.weight"
    assert published_key("layer1.0.downsample.1.running_var") == "layer1.0.downsample.1.running_var"
    network = small(norm="bn")
    assert len({published_key(key) for key in network.state_dict()}) == len(network.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("complete", [False, True])
def test_published_weights_there_and_back(wrapped, complete):
    """With or without the constants, which the published converter leaves out."""
    source, target, clip = small(norm="bn"), small(norm="bn", seed=1), seeded_clip(1, 16, 3, 64, 64)
    state = source.export_published()
    constants = [key for key in state if key.endswith("weights_cor")]
    assert len(constants) == 5 and state[constants[0]].shape == (8, 4, 3, 3)
    assert torch.equal(state[constants[0]], torch.full((8, 4, 3, 3), 1 / 8))
    if not complete:
        for key in constants:
            del state[key]
    before = target(clip)
    assert before.isfinite().all()
    target.load_published({"model": {f"module.{key}": tensor for key, tensor in state.items()}} if wrapped else state)
    assert torch.equal(target(clip), source(clip))
    assert (target(clip) - before).abs().max() > 1e-3


def test_weights_of_the_correlation_that_are_not_constant():
    network, clip = small(norm="bn"), seeded_clip(1, 16, 3, 64, 64)
    before, state = network(clip), network.export_published()
    state["layer1.0.dtf_blk.weights_cor"] = 5 * state["layer1.0.dtf_blk.weights_cor"]
    network.load_published(state)
    assert (network(clip) - before).abs().max() > 1e-3
    assert torch.equal(network.export_published()["layer1.0.dtf_blk.weights_cor"], torch.full((8, 4, 3, 3), 5 / 8))
    network.load_published(state)
    with pytest.raises(ValueError, match=r"layer1\.0\.dtf_blk\.weights_cor is not constant, which predictor='native'"):
        small(norm="bn", predictor="resample").load_published(state)


def test_weights_that_do_not_fit():
    state = small(norm="bn").export_published()
    with pytest.raises(ValueError, match=r"of another shape \(filters are tied to clip_length\): .*filter_g.weight"):
        small(norm="bn", clip_length=32).load_published(state)
    with pytest.raises(ValueError, match="no published weights fit predictor='taps'"):
        small(sharing="paper", predictor="taps", width=16).load_published(state)
    del state["fc.bias"]
    state["head.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"1 missing: fc\.bias; 1 unexpected: head\.bias"):
        small(norm="bn").load_published(state)


# ---- laws


@pytest.mark.parametrize("predictor", ["native", "resample"])
@pytest.mark.parametrize(("frames", "h", "w"), [(16, 64, 32), (4, 33, 47), (24, 20, 65)])
def test_pyramid_of_any_length_and_size(predictor, frames, h, w):
    network, clip = small(predictor=predictor), seeded_clip(2, frames, 3, h, w)
    pyramid = network.features(clip)
    for i, level in enumerate(pyramid):
        stride = 4 * 2**i
        assert level.shape == (2, frames // 4, 32 * 2**i, -(-h // stride), -(-w // stride))
        assert level.isfinite().all()
    assert_close(network(clip), network.fc(pyramid[-1].mean((1, 3, 4))))
    assert_close(network(clip[1:]), network(clip)[1:], atol=1e-4, rtol=1e-4)  # clips of a batch do not meet


def test_frames_meet_in_the_filters_alone():
    """At the start of training groups of four frames are apart; once the filters are awake all see all."""
    clip = seeded_clip(1, 16, 3, 32, 32)
    changed = clip.clone()
    changed[:, 5] = 1 - changed[:, 5]
    network = small()
    awake = (network.features(changed)[0] - network.features(clip)[0]).abs().amax((0, 2, 3, 4))
    assert (awake > 1e-4).all()
    for block in network.modules():
        if isinstance(block, DTFBlock):
            block.scale.zero_()
    apart = (network.features(changed)[-1] - network.features(clip)[-1]).abs().amax((0, 2, 3, 4))
    assert (apart > 0).tolist() == [False, True, False, False]


def test_every_parameter_has_a_gradient():
    network = small().requires_grad_(True)
    network(seeded_clip(2, 16, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_half_precision_is_close():
    network, clip = small(), seeded_clip(1, 16, 3, 64, 64)
    exact = network(clip)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(network(clip), exact) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18, "blocks": None}, "depth=18 is none of 50, 101"),
        ({"clip_length": 18}, "clip_length=18 does not divide by the 4 frames of the first layer"),
        ({"sharing": "mine"}, "sharing='mine' is none of"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        small(**arguments)


def test_clips_that_do_not_fit():
    with pytest.raises(ValueError, match="a clip of T=6 does not divide by the 4 frames of the first layer"):
        small()(seeded_clip(1, 6, 3, 32, 32))
