"""Weights of image networks in the action backbones: what a fresh one computes is what its image network computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from image_networks import (
    BLOCKS,
    DEPTHS,
    HEADS,
    WINDOW,
    State,
    clip_embedding,
    clip_file,
    images,
    resnet,
    resnet_file,
    swin,
    swin_file,
)
from referees import torchvision
from safetensors.torch import save_file
from tiny import seeded_clip, unchecked
from torch import nn
from torch.testing import assert_close

from archs.action.atm_clip import ATMCLIP, resized_positions
from archs.action.atm_resnet import ATMResNet
from archs.action.dtf_net import MEAN, STD, DTFNet
from archs.action.dtf_transformer import DTFTransformer
from archs.action.inflate import inflate, inflated_kernel
from archs.contract import ClipClassifier
from restore.backbone_weights import load_backbone
from restore.checkpoint import CheckpointError


def dtf_net(**arguments: Any) -> DTFNet:
    return _made(DTFNet, {"width": 8, "blocks": BLOCKS, "classes": 5, "clip_length": 8}, arguments)


def atm_resnet(**arguments: Any) -> ATMResNet:
    return _made(ATMResNet, {"width": 8, "depth": BLOCKS, "classes": 5, "hidden": 4, "context": 3}, arguments)


def dtf_transformer(**arguments: Any) -> DTFTransformer:
    sizes = {"image_size": 64, "embed_dim": 16, "depths": DEPTHS, "heads": HEADS, "window": WINDOW}
    return _made(DTFTransformer, {**sizes, "classes": 5, "clip_length": 8}, arguments)


def atm_clip(**arguments: Any) -> ATMCLIP:
    sizes = {"patch": 4, "width": 16, "depth": 2, "heads": 2, "projected": 8, "size": 16}
    return _made(ATMCLIP, {**sizes, "atm_at": 1, "hidden": 4, "classes": 5}, arguments)


def _made(kind: Any, sizes: dict[str, Any], arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return kind(**{**sizes, **arguments}).eval().requires_grad_(False)


CASES: dict[str, tuple[Callable[..., ClipClassifier], State]] = {
    "dtf_net": (dtf_net, resnet_file()),
    "atm_resnet": (atm_resnet, resnet_file()),
    "dtf_transformer": (dtf_transformer, swin_file()),
    "dtf_transformer, timm": (dtf_transformer, swin_file(timm=True)),
    "atm_clip": (atm_clip, clip_file()),
    "atm_clip, timm": (atm_clip, clip_file(timm=True)),
}
each_file = pytest.mark.parametrize(("make", "file"), CASES.values(), ids=list(CASES))


# ---- laws


@pytest.mark.parametrize("constant", [False, True])
def test_dtf_net_is_its_resnet_on_the_third_frame_of_every_group(constant):
    network, file, clip = dtf_net(), resnet_file(), seeded_clip(2, 8, 3, 40, 36)
    inflate(network, file)
    clip = clip[:, :1].expand_as(clip) if constant else clip
    expected = resnet(file, clip[:, 2::4].flatten(0, 1))
    for ours, theirs in zip(network.features(clip), expected, strict=True):
        assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)
    pooled = expected[-1].mean((2, 3)).unflatten(0, (2, 2)).mean(1)
    assert_close(network(clip), network.fc(pooled), atol=1e-4, rtol=1e-4)


def test_atm_resnet_is_its_resnet_on_every_frame():
    network, file, clip = atm_resnet(), resnet_file(), seeded_clip(2, 3, 3, 40, 36)
    inflate(network, file)
    for ours, theirs in zip(network.features(clip), resnet(file, clip.flatten(0, 1)), strict=True):
        assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("make", "arguments"), [(dtf_net, {"clip_length": 4}), (atm_resnet, {})])
def test_torchvisions_own_resnet(make, arguments):
    """Its names and its numbers: frames that do not change have the features, and with its head the logits."""
    torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(1)
    image_network = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5).eval().requires_grad_(False)
    network, frame = make(width=64, **arguments), seeded_clip(1, 3, 32, 32)
    inflate(network, image_network.state_dict())
    network.fc = image_network.fc
    logits = image_network(images(frame, MEAN, STD))
    assert_close(network(frame[:, None].expand(1, 4, 3, 32, 32)), logits, atol=1e-4, rtol=1e-4)


def test_dtf_transformer_is_its_swin_on_the_third_frame_of_every_group():
    network, file, clip = dtf_transformer(), swin_file(), seeded_clip(1, 8, 3, 64, 64)
    inflate(network, file)
    *stages, last = swin(file, clip[0, 2::4])
    for ours, theirs in zip(network.features(clip), stages, strict=True):
        assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)
    assert_close(network(clip), network.fc(last.mean((0, 1, 2)))[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("atm_at", [None, 0, 1])
def test_atm_clip_is_clip_in_the_middle_of_a_still(atm_at):
    """Two shifts a block bring the zeros beyond the ends of the clip one frame nearer each; fresh ATM is a ReLU."""
    network, file, frames = atm_clip(atm_at=atm_at), clip_file(), seeded_clip(2, 3, 16, 16)
    inflate(network, file)
    embedded = network.embed(frames[:, None].expand(2, 9, 3, 16, 16))
    expected = clip_embedding(file, frames, atm_at)
    assert_close(embedded[:, 4], expected, atol=1e-4, rtol=1e-4)
    assert (embedded[:, 0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dtf_transformer", "atm_clip"])
def test_both_spellings_give_the_same_network(name):
    (make, first), (_, timm) = CASES[name], CASES[f"{name}, timm"]
    one, other = make(), make()
    inflate(one, first)
    inflate(other, timm)
    assert not first.keys() & timm.keys() or name == "dtf_transformer"
    for key, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


@each_file
def test_what_is_reported(make, file):
    """Every key once; what the image network lacks is fresh and as it was, what the backbone lacks is dropped."""
    network, untouched = make(), make().state_dict()
    report = inflate(network, file)
    assert sorted(report.loaded + report.fresh) == sorted(untouched) and not report.resized
    assert len(report.loaded) + len(report.dropped) == len(file)
    assert all(torch.equal(network.state_dict()[key], untouched[key]) for key in report.fresh)
    lacking = ("dtf.", "atm.", "shift", "fc.", "head.")
    assert all(any(part in key for part in lacking) for key in report.fresh)
    assert not any(part in key for key in report.loaded for part in lacking)
    assert all(not torch.equal(network.state_dict()[key], untouched[key]) for key in report.loaded if "conv" in key)
    beyond = ("head", "fc.", "patch_embed.norm", "position_index", "attn_mask", "text", "logit_scale", "ln_final",
              "transformer.", "token_embedding", "positional_embedding", "vocab_size", "input_resolution")  # fmt: skip
    assert all(key.startswith(beyond) or key.endswith(beyond) for key in report.dropped), report.dropped


@pytest.mark.parametrize("name", ["dtf_net", "dtf_transformer", "atm_clip"])
def test_exported_under_published_names_it_is_the_file(name):
    make, file = CASES[name]
    network, again = make(), make()
    report = inflate(network, file)
    exported = network.export_published()
    again.load_published(exported)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in network.state_dict().items())
    for key in file.keys() - set(report.dropped):
        ours = exported[key]
        assert torch.equal(ours[:, :, ours.shape[2] // 2] if ours.ndim > file[key].ndim else ours, file[key]), key


def test_wrapped_files_and_halves():
    for wrap in ("model", "state_dict", "module"):
        network = dtf_net()
        inflate(network, {"epoch": 3, wrap: {f"module.{key}": t.half() for key, t in resnet_file().items()}})
        weight = network.state_dict()["layer1.0.conv2.weight"]
        assert weight.dtype == torch.float32
        assert torch.equal(weight[:, :, 0], resnet_file()["layer1.0.conv2.weight"].half().float())


def test_files_that_lack_a_little():
    """No head, no counters of batches (before PyTorch 0.4.1), the image tower alone; a fine-tuned classifier."""
    counted = {key: t for key, t in resnet_file().items() if not key.startswith("fc.")}
    report = inflate(dtf_net(), {key: t for key, t in counted.items() if not key.endswith("num_batches_tracked")})
    assert not report.dropped and "layer1.0.bn1.num_batches_tracked" in report.fresh
    tower = {k.removeprefix("visual."): t for k, t in clip_file().items() if k.startswith("visual.")}
    alone, whole = atm_clip(), atm_clip()
    inflate(whole, clip_file())
    assert inflate(alone, tower).dropped == ()
    assert all(torch.equal(alone.state_dict()[key], tensor) for key, tensor in whole.state_dict().items())
    classifier = {**clip_file(timm=True), "head.weight": torch.ones(10, 16), "head.bias": torch.ones(10)}
    report = inflate(atm_clip(), classifier)
    assert "project" in report.fresh and report.dropped == ("head.weight", "head.bias")


@pytest.mark.parametrize("timm", [False, True])
def test_positions_of_another_grid(timm):
    network, file = atm_clip(), clip_file(side=6)
    assert inflate(network, clip_file(side=6, timm=timm)).resized == ("position",)
    assert torch.equal(network.position, resized_positions(file["visual.positional_embedding"], (4, 4)))


def test_a_kernel_in_time():
    kernel = seeded_clip(2, 3, 4, 5)
    for frames, middle in [(1, 0), (3, 1), (4, 2)]:
        inflated = inflated_kernel(kernel, frames)
        assert torch.equal(inflated[:, :, middle], kernel) and torch.equal(inflated.sum(2), kernel)


# ---- files on disk


@each_file
def test_files_are_told_apart_by_their_keys(make, file, tmp_path):
    source = make()
    report = inflate(source, file)
    torch.save({"model": file}, tmp_path / "image.pth")
    save_file(file, tmp_path / "image.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "ours.pth")
    expected = {"image.pth": report, "image.safetensors": report, "ours.pth": None}
    if not isinstance(source, ATMResNet):  # nothing of it is published
        torch.save({"module": source.export_published()}, tmp_path / "published.pth")
        expected["published.pth"] = None
    network, fresh = make(), make().state_dict()
    for name, report in expected.items():
        network.load_state_dict(fresh)
        found = load_backbone(network, tmp_path / name)
        assert found is report or {*found.loaded} == {*report.loaded}  # a safetensors file has an order of its own
        assert all(torch.equal(network.state_dict()[key], t) for key, t in source.state_dict().items())


def test_a_whole_resnet_is_its_own(tmp_path):
    """Without ATM a network's own file has an image network's keys, head included."""
    torch.save(resnet_file(), tmp_path / "resnet.pth")
    network = atm_resnet(after=(), classes=10)
    assert load_backbone(network, tmp_path / "resnet.pth") is None
    assert torch.equal(network.fc.bias, resnet_file()["fc.bias"])
    assert "fc.bias" in load_backbone(atm_resnet(after=()), tmp_path / "resnet.pth").dropped


# ---- refusals

REFUSALS = {
    "deeper": (dtf_net, resnet_file(blocks=(1, 3, 1, 1)), r"18 unknown: layer2\.2\.conv1\.weight, .*\.\.\.; its"),
    "shallower": (atm_resnet, resnet_file(blocks=(1,) * 4), r"15 missing: layer2\.1\.conv1\.weight, .*\.\.\.; its"),
    "wider": (dtf_net, resnet_file(16), r"conv1\.weight \(16, 3, 7, 7\) instead of \(8, 3, 7, 7\), bn1.*depth, blocks"),
    "in 3D": (
        dtf_net, {**resnet_file(), "conv1.weight": torch.zeros(8, 3, 5, 7, 7)},
        r": 1 of another shape: conv1\.weight \(8, 3, 5, 7, 7\) instead of \(8, 3, 7, 7\); its",
    ),
    "misspelt": (dtf_net, {**resnet_file(), "conv_1.bias": torch.zeros(8)}, r": 1 unknown: conv_1\.bias; its names"),
    "wider Swin": (dtf_transformer, swin_file(32), r"\(32, 3, 4, 4\) instead of \(16, 3, 4, 4\), .*size, depths"),
    "another window": (
        dtf_transformer, swin_file(window=3, timm=True),
        r"4 of another shape: layers\.0\.blocks\.0\.attn\.relative_position_bias_table \(25, 1\) instead of \(49, 1\)"
        r", .*tables of \(2 \* window - 1\)\^2 rows are not resized",
    ),
    "wider CLIP": (atm_clip, clip_file(32), r"positional_embedding \(17, 32\) instead of \(17, 16\).*; its names"),
    "another patch": (atm_clip, clip_file(patch=2, timm=True), r"patch_embed\.proj\.weight \(16, 3, 2, 2\) instead of"),
    "no square": (
        atm_clip, {**clip_file(), "visual.positional_embedding": torch.zeros(7, 16)},
        r"1 of another shape: visual\.positional_embedding \(7, 16\) .*from square grids only",
    ),
    "Swin for ResNet": (atm_resnet, swin_file(), r"unknown: patch_embed\.proj\.weight, .*; its names are tor"),
    "ResNet for CLIP": (atm_clip, resnet_file(), r"missing: visual\.class_embedding, .*unknown: bn1\.weight"),
    "DTF-Net": (dtf_net, dtf_net().export_published(), r"layer1\.0\.dtf_blk\.alpha1, .*weights of a video network"),
    "ATM": (atm_resnet, atm_resnet().state_dict(), r"atm\.2\.0\.reduce\.0\.weight, .*weights of a video network"),
    "no tensors": (dtf_net, {"epoch": 3}, r"holds no state_dict of tensors; give one, bare or under model"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "file", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_what_does_not_fit(make, file, message):
    network, before = make(), make().state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        inflate(network, file)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in before.items())


def test_networks_without_an_image_network():
    with (
        unchecked(),
        pytest.raises(ValueError, match="Linear has no image network; those that start from one are DTFNet"),
    ):
        inflate(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})


def test_refused_files_are_named(tmp_path):
    path = tmp_path / "weights.pt"

    def refusal(network: ClipClassifier) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_backbone(network, path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message, message
        return message

    assert "no such file; nothing is downloaded" in refusal(dtf_net())
    for state, message in [
        (resnet_file(16), "not the weights of a ResNet like this network's"),
        (dtf_net(clip_length=16).export_published(), "filters are tied to clip_length"),
        (dtf_net(classes=6).state_dict(), "fc.bias (6,) instead of (5,)"),
    ]:
        torch.save(state, path)
        assert message in refusal(dtf_net())
    torch.save(dtf_net().export_published(), path)
    assert "weights of a video network" in refusal(atm_resnet())
    path.write_bytes(b"no weights")
    assert "not a readable file of weights" in refusal(dtf_net())
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)  # as OpenAI publishes CLIP
    assert f'torch.save(torch.jit.load("{path}", "cpu").state_dict(), "weights.pth")' in refusal(atm_clip())
