"""ATM in a ResNet: the ResNet's sizes, names and numbers, and that ATM starts silent and lets frames meet."""

from typing import Any

import pytest
import torch
from tiny import seeded_clip, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs.action.atm_resnet import ATMResNet

TINY: dict[str, Any] = {"classes": 5, "depth": (1, 2, 1, 1), "width": 4, "hidden": 4, "context": 3}


def tiny(awake: bool = True, **arguments: object) -> ATMResNet:
    torch.manual_seed(0)
    network = ATMResNet(**{**TINY, **arguments}).eval().requires_grad_(False)
    for key, parameter in network.named_parameters():
        if awake and "transfer.expand" in key:
            parameter.normal_()
    return network


@pytest.mark.parametrize(
    ("depth", "parameters", "tensors", "gmac"), [(50, 25_557_032, 320, 4.09), (101, 44_549_160, 626, 7.80)]
)
def test_size_of_the_resnet(depth, parameters, tensors, gmac):
    """Without ATM the classifier of 1000 classes has the well-known numbers of torchvision's."""
    with torch.device("meta"):
        network = ATMResNet(classes=1000, depth=depth, after=()).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 2, 3, 224, 224))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert counter.get_total_flops() / 4e9 == pytest.approx(gmac, rel=5e-3)
    names = {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer3.5.conv3.weight", "fc.bias"}
    assert names <= network.state_dict().keys()


def test_size_of_atm():
    """At the default place, 28x28 of 512 channels, on every second pixel."""
    with torch.device("meta"):
        plain, network = ATMResNet(classes=400, after=()), ATMResNet(classes=400)
        gmac = []
        for each in (plain, network):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                each.eval()(torch.zeros(1, 8, 3, 224, 224))
            gmac.append(counter.get_total_flops() / 2e9)
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert added and all(key.startswith(("atm.2.0.", "atm.2.1.")) for key in added)
    both = 2 * 9 * 512 * 64 + 2 * 64 * 512 + 2 * (2 * 36_864 + 128) + 2 * 9 * 320 * 64 + 1_000
    count = sum(parameter.numel() for parameter in network.atm.parameters())
    assert count == pytest.approx(both + 46_988, rel=2e-3)
    assert gmac[1] - gmac[0] == pytest.approx(3.9, rel=0.02)


def test_the_resnet_by_hand():
    """A network without ATM against plain functions of its state: stem, both kinds of block, head."""
    network, clip = tiny(after=()), seeded_clip(2, 2, 3, 40, 36)
    state = {key: tensor + 0.1 * torch.ones_like(tensor) for key, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = F.conv2d((clip.flatten(0, 1) - mean) / std, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(_norm(x, state, "bn1").relu(), 3, 2, 1)
    for block in ("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"):
        stride = 2 if block in ("layer2.0", "layer3.0", "layer4.0") else 1
        y = _norm(F.conv2d(x, state[f"{block}.conv1.weight"]), state, f"{block}.bn1").relu()
        y = F.conv2d(y, state[f"{block}.conv2.weight"], stride=stride, padding=1)
        y = F.conv2d(_norm(y, state, f"{block}.bn2").relu(), state[f"{block}.conv3.weight"])
        if f"{block}.downsample.0.weight" in state:
            x = _norm(F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride), state, f"{block}.downsample.1")
        x = (_norm(y, state, f"{block}.bn3") + x).relu()
    assert_close(network.features(clip)[-1].flatten(0, 1), x, atol=1e-3, rtol=1e-4)
    pooled = x.mean((2, 3)).unflatten(0, (2, 2)).mean(1)
    assert_close(network(clip), F.linear(pooled, state["fc.weight"], state["fc.bias"]), atol=1e-3, rtol=1e-4)


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


@pytest.mark.parametrize("after", [(2,), (1, 3, 4)])
def test_fresh_atm_changes_nothing(after):
    fresh, plain = tiny(awake=False, after=after, operations=("add", "sub", "mul", "div")), tiny(after=())
    fresh.load_state_dict(plain.state_dict(), strict=False)
    clip = seeded_clip(1, 3, 3, 32, 32)
    assert torch.equal(fresh(clip), plain(clip))
    for ours, theirs in zip(fresh.features(clip), plain.features(clip), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("frames", "size"), [(1, (32, 32)), (3, (33, 70)), (2, (8, 47))])
def test_any_length_and_size(frames, size):
    network, clip = tiny(), seeded_clip(2, frames, 3, *size)
    assert network(clip).shape == (2, 5)
    for maps, channels, stride in zip(
        network.features(clip), network.feature_channels, network.feature_strides, strict=True
    ):
        assert maps.shape == (2, frames, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert maps.isfinite().all()


def test_frames_meet_after_their_stage_only():
    """Context 3, two operations in turn: a frame reaches its neighbours' neighbours; clips never meet."""
    network, clips = tiny(hidden=16, operations=("sub", "add")), seeded_clip(2, 6, 3, 64, 64)
    changed = clips.clone()
    changed[0, 1] = 1 - changed[0, 1]
    reached = [
        ((after - before).abs().amax((2, 3, 4)) > 1e-5)
        for after, before in zip(network.features(changed), network.features(clips), strict=True)
    ]
    assert reached[0].tolist() == [[False, True, False, False, False, False], [False] * 6]
    for stage in reached[1:]:
        assert stage.tolist() == [[True, True, True, True, False, False], [False] * 6]
    assert (network(clips) - network(clips.flip(1))).abs().max() > 1e-3  # and the order of frames matters


def test_gradients_reach_every_weight():
    network, clip = tiny().requires_grad_(), seeded_clip(1, 3, 3, 40, 40).requires_grad_()
    sum(maps.square().mean() for maps in network.features(clip)).backward()
    for key, parameter in [("clip", clip), *network.named_parameters()]:
        if not key.startswith("fc."):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "depth=18 is none of 50, 101, nor four numbers of blocks"),
        ({"after": (0, 2)}, r"after=\(0, 2\) are not stages 1\.\.4"),
        ({"operations": ("xor",)}, "operation='xor' is none of add, sub, mul, div"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        ATMResNet(**{**TINY, **arguments})
