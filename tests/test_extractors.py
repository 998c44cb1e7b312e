"""Action backbones as encoders: what their layers give in a classifier, at every frame and pixel; weights that load."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import PUBLISHED, RECURRENT, awaken, seeded_clip, unchecked
from torch import Tensor
from torch.testing import assert_close

from archs import STDAN
from archs.action.atm_resnet import ATMResNet
from archs.action.dtf_net import DTFNet
from archs.action.extractors import EXTRACTORS, ActionExtractor, at_every_pixel
from archs.layers.window_attention import SwinTrunk
from restore.checkpoint import CheckpointError, load_network, save_network
from restore.cost import count_parameters, counting
from restore.options import OptionError, load_options
from restore.restoration import load_extractor
from restore.run import recompute_activations
from restore.training import prepared

TAPS = {"predictor": "taps", "norm": "gn", "sharing": "paper", "groups": 8}
NARROW = {"hidden": 32, "context": 3, "norm": "group", "ends": "replicate"}

every_extractor = pytest.mark.parametrize("name", EXTRACTORS)


def whole(name: str) -> DTFNet | ATMResNet:
    """The action network of an extractor of 8 channels with all its stages, nothing left at zero."""
    torch.manual_seed(1)
    if name == "dtf_resnet":
        network = DTFNet(blocks=(3, 1, 1, 1), width=8, classes=4, **TAPS)
    else:
        network = ATMResNet(depth=(3, 1, 1, 1), width=8, classes=4, after=(1,), **NARROW)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return awaken(network).eval().requires_grad_(False)


def image_resnet() -> dict[str, Tensor]:
    """A ResNet of images of that width under torchvision's names, as old files have it: without counters."""
    torch.manual_seed(2)
    state = ATMResNet(depth=(3, 1, 1, 1), width=8, classes=1000, after=()).state_dict()
    return {key: torch.rand_like(tensor) - 0.5 * (tensor.ndim > 1) for key, tensor in state.items() if tensor.ndim}


def small(name: str, *, dense: bool = True) -> ActionExtractor:
    torch.manual_seed(0)
    return EXTRACTORS[name](8, dense=dense).eval().requires_grad_(False)


def deep(extractor: ActionExtractor, clip: Tensor) -> Tensor:
    """What the first stage gives, on the extractor's grid."""
    seen: list[Tensor] = []
    hook = extractor.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    height, width = clip.shape[-2:] if extractor.dense else (-(-length // 4) for length in clip.shape[-2:])
    extractor(clip, clip.new_zeros(*clip.shape[:2], 8, height, width))
    hook.remove()
    return seen[0].unflatten(0, clip.shape[:2])


# ---- features


@every_extractor
def test_every_fourth_feature_is_that_of_a_quarter_of_the_size(name):
    """The dense evaluation, temporal blocks included, with weights that the classifier may have."""
    dense, coarse = small(name), small(name, dense=False)
    for extractor in (dense, coarse):
        assert not extractor.load_backbone(whole(name).state_dict())
    for size in ((16, 24), (13, 10)):
        clip = seeded_clip(1, 3, 3, *size)
        assert_close(deep(dense, clip)[..., ::4, ::4], deep(coarse, clip), atol=1e-4, rtol=1e-4)


def test_the_coarse_features_are_those_of_atm_resnet():
    network, extractor = whole("atm_resnet"), small("atm_resnet", dense=False)
    extractor.load_backbone(network.state_dict())
    clip = seeded_clip(2, 3, 3, 16, 20)
    assert_close(deep(extractor, clip), network.features(clip)[0], atol=1e-5, rtol=1e-5)


def test_the_third_frame_has_the_features_of_dtf_net():
    """Of four, without filters over time: of these the classifier has a quarter of the frames."""
    network, extractor = whole("dtf_resnet"), small("dtf_resnet", dense=False)
    for block in network.layer1:
        block.dtf.scale.zero_()
        block.dtf.bias.zero_()
    extractor.load_backbone(network.state_dict())
    clip = seeded_clip(1, 4, 3, 16, 20)
    assert_close(deep(extractor, clip)[:, 2:3], network.features(clip)[0], atol=1e-5, rtol=1e-5)


def test_with_weights_of_images_frames_begin_apart():
    extractor = small("dtf_resnet")
    extractor.load_backbone(image_resnet())
    clip = seeded_clip(1, 4, 3, 8, 8)
    changed = clip.clone()
    changed[:, 1] += 0.5
    difference = (deep(extractor, changed) - deep(extractor, clip)).abs().amax((0, 2, 3, 4))
    assert difference[1] > 0.1 and not difference[[0, 2, 3]].any()


@every_extractor
def test_filters_let_frames_meet(name):
    extractor = awaken(small(name), 0.5)
    clip = seeded_clip(1, 5, 3, 8, 8)
    changed = clip.clone()
    changed[:, 2] += 0.5
    difference = (deep(extractor, changed) - deep(extractor, clip)).abs().amax((0, 2, 3, 4))
    assert (difference[1:4] > 0).all()


def test_a_stage_at_every_pixel_is_its_dilation():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    x = seeded_clip(2, 1, 3, 9, 14)

    def stage(pictures: Tensor) -> Tensor:
        return conv(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    expected = torch.nn.functional.conv2d(x[:, 0], conv.weight, conv.bias, padding=4, dilation=4)
    assert_close(at_every_pixel(stage, x, 4)[:, 0], expected)


@every_extractor
def test_statistics_of_norms_stay(name):
    """A restoration network's batches are small: in training, too, clips of a batch do not meet."""
    extractor = small(name).train()
    before = {key: tensor.clone() for key, tensor in extractor.state_dict().items()}
    clip = seeded_clip(2, 2, 3, 8, 8)
    assert_close(deep(extractor, clip)[1:], deep(extractor, clip[1:]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in extractor.state_dict().items())


# ---- weights


@every_extractor
def test_weights_of_the_action_network_and_of_images(name):
    extractor, network = small(name), whole(name)
    assert extractor.backbone.state_dict().keys() < network.state_dict().keys()
    assert not extractor.load_backbone(network.state_dict())
    state = network.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in extractor.backbone.state_dict().items())
    extractor, state = small(name), image_resnet()
    fresh = extractor.load_backbone(state)
    assert fresh and all(".dtf." in key or key.startswith("atm.") for key in fresh)
    assert torch.equal(extractor.backbone.conv1.weight.sum(2) if name == "dtf_resnet" else
                       extractor.backbone.conv1.weight, state["conv1.weight"])  # fmt: skip


@every_extractor
def test_weights_that_do_not_fit(name, tmp_path):
    extractor, state = small(name), whole(name).state_dict()
    before = {key: tensor.clone() for key, tensor in extractor.state_dict().items()}
    native = DTFNet(blocks=(3, 1, 1, 1), width=8, classes=4)
    for other, message in (
        ({key: tensor for key, tensor in state.items() if key != "bn1.bias"}, "1 are missing.*: bn1.bias"),
        ({**state, "bn1.bias": torch.zeros(9)}, "of another shape: bn1.bias"),
        (native.export_published(), "not the weights of (DTFNet|ATMResNet)"),
        (STDAN(**PUBLISHED).state_dict(), "not the weights of a ResNet"),
        ({**image_resnet(), "conv1.weight": torch.zeros(64, 3, 7, 7)}, "not the weights of a ResNet.*conv1.weight"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            extractor.load_backbone(other)
        assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in extractor.state_dict().items())
    network, path = STDAN(**PUBLISHED, extractor=name), tmp_path / "r.pth"
    torch.save(native.export_published(), path)
    with pytest.raises(CheckpointError, match=f"{path}: not the weights of"):
        load_extractor(network, str(path))
    with pytest.raises(CheckpointError, match=f"{path}x"):
        load_extractor(network, f"{path}x")
    with pytest.raises(OptionError, match=r"network_g\.extractor: dtf_resnet or atm_resnet"):
        load_extractor(STDAN(**PUBLISHED), str(path))


def test_a_run_starts_from_a_file(options_file, tmp_path):
    """Weights of images, which keep still at first; the filters over time, which they lack, learn at once."""
    state = image_resnet()
    save_file(state, tmp_path / "resnet.safetensors")
    still = r"^encoder\.backbone\.(?!.*\.dtf\.)"
    changes = [
        "network_g.extractor=dtf_resnet", f"path.pretrain_extractor={tmp_path / 'resnet.safetensors'}",
        f"train.param_groups=[{{match: '{still}', freeze_until: 3}}]",
    ]  # fmt: skip
    begun = prepared(load_options(options_file, changes)).run
    backbone = begun.network.encoder.backbone
    assert torch.equal(backbone.layer1[2].conv1.weight[:, :, 0], state["layer1.2.conv1.weight"])
    assert begun.network.upsample.before.weight.is_contiguous(memory_format=torch.channels_last)
    begun.iteration = 1
    begun.network(seeded_clip(1, 2, 3, 8, 8)).sum().backward()
    begun.drop_frozen_gradients()
    moving = {key for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert moving and all(".dtf." in key for key in moving)


# ---- in the network


@every_extractor
def test_every_parameter_learns_and_weights_survive(name, tmp_path):
    torch.manual_seed(0)
    arguments = {**RECURRENT, "extractor": name}
    network = STDAN(**arguments).train()
    recompute_activations(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    asleep = {key for key, _ in network.named_parameters() if key.startswith("encoder.")}
    for step in range(3):
        optimizer.zero_grad()
        clip = seeded_clip(1, 2, 3, 8, 12, seed=step)
        (network(clip) - seeded_clip(1, 3, 3, 32, 48, seed=step)).abs().mean().backward()
        asleep -= {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not asleep
    save_network(tmp_path / "n.safetensors", network, {"type": "stdan", **arguments})
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / "n.safetensors")(clip), network.eval()(clip))


def test_the_default_is_the_encoder_of_the_trunk():
    torch.manual_seed(0)
    plain = STDAN(**PUBLISHED)
    torch.manual_seed(0)
    named = STDAN(**PUBLISHED, extractor="swin")
    assert isinstance(named.encoder, SwinTrunk)
    assert all(torch.equal(tensor, named.state_dict()[key]) for key, tensor in plain.state_dict().items())
    with unchecked(), pytest.raises(ValueError, match="extractor='i3d' is none of swin, dtf_resnet, atm_resnet"):
        STDAN(**PUBLISHED, extractor="i3d")


def test_they_cost_less_than_what_they_replace():
    """At the published width, which is that of ResNet-50."""
    clip, seen = torch.zeros(1, 2, 3, 16, 16), torch.zeros(1, 2, 64, 16, 16)
    costs = []
    for encoder in (STDAN(decoder_depths=(1,)).encoder, *(extractor(64) for extractor in EXTRACTORS.values())):
        inputs = (clip, seen) if isinstance(encoder, ActionExtractor) else (seen[0],)
        with torch.no_grad(), counting() as counter:
            encoder.eval()(*inputs)
        costs.append((counter.get_total_flops(), count_parameters(encoder)))
    assert all(gmac < costs[0][0] and count < costs[0][1] for gmac, count in costs[1:])
