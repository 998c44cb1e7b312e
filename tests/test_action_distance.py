"""Distances by a trained action network: laws of the distance, what stays frozen, files of weights, options."""

from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import seeded_clip, unchecked
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action import CLASSIFIERS
from archs.contract import ClipClassifier
from restore import action_distance
from restore.action_distance import ActionDistance, ActionLoss, backbone
from restore.losses import LOSSES, L1Loss
from restore.metric_table import METRICS
from restore.metrics import Metric
from restore.schema import Component, OptionError, construct

TINY: dict[str, dict[str, Any]] = {
    "dtf_net": {"width": 8, "blocks": [1, 1, 1, 1], "clip_length": 8, "classes": 3},
    "dtf_transformer": {
        "embed_dim": 16, "heads": [1, 1, 2, 2], "depths": [2, 1, 1, 1], "window": 4, "image_size": 32, "clip_length": 8,
        "classes": 3,
    },
    "atm_resnet": {"width": 8, "depth": [1, 1, 1, 1], "hidden": 8, "context": 3, "classes": 3},
    "atm_clip": {
        "patch": 8, "width": 16, "depth": 4, "heads": 2, "projected": 8, "atm_at": 2, "size": 32, "hidden": 8,
        "classes": 3,
    },
}  # fmt: skip
CLIP = seeded_clip(1, 8, 3, 32, 32)
OTHER = seeded_clip(1, 8, 3, 32, 32, seed=1)


def section(name: str) -> dict[str, Any]:
    return {"type": name, **TINY[name]}


def train(network: nn.Module, *clips: Tensor) -> None:
    """No training: everything takes part, and norms fit their features."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = None  # the mean over all clips
    with torch.no_grad():
        for clip in clips:
            network.train().features(clip)
    network.eval()


@pytest.fixture(scope="module")
def trained() -> dict[str, ClipClassifier]:
    torch.manual_seed(0)
    networks = {name: backbone(section(name)) for name in TINY}
    for network in networks.values():
        train(network, CLIP, OTHER)
    return networks


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory) -> dict[str, str]:
    """Weights under our names."""
    folder = tmp_path_factory.mktemp("backbones")
    for name, network in trained.items():
        safetensors.torch.save_file(network.state_dict(), folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in TINY}


@pytest.fixture(scope="module", params=TINY)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loss(name, files) -> ActionLoss:
    return ActionLoss(network=section(name), weights=files[name], loss_weight=1.0)


def texture(seed: int, frames: int = 8, size: int = 128) -> Tensor:
    """Amplitudes fall as 1/f, standard deviation 0.2; moves by (1, 2) px a frame."""
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    falling = 1 / (fy.square() + fx.square()).sqrt().clamp_min(1 / size)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    still = torch.fft.irfft2(torch.fft.rfft2(noise) * falling, s=(size, size))
    still = 0.5 + 0.2 * (still - still.mean((-2, -1), keepdim=True)) / still.std((-2, -1), keepdim=True)
    return torch.stack([still.roll((t, 2 * t), (-2, -1)) for t in range(frames)], 1)


def blurred(clip: Tensor, times: int) -> Tensor:
    for _ in range(times):
        clip = F.avg_pool2d(clip.flatten(0, 1), 3, 1, 1, count_include_pad=False).unflatten(0, clip.shape[:2])
    return clip


# ---- laws


def test_every_network_is_tested():
    assert CLASSIFIERS.keys() == TINY.keys()


def test_equal_clips(loss):
    """The least value, with a gradient that is finite."""
    restored = CLIP.clone().requires_grad_()
    value = loss(restored, CLIP)
    value.backward()
    assert value == 0 and not restored.grad.any()


def test_features_of_no_length(name, files):
    """Where all are zero, as a ReLU may leave them, there is no direction, but a number and a gradient."""
    loss = ActionLoss(network=section(name), weights=files[name])
    for parameter in loss.parameters():
        parameter.zero_()
    restored = CLIP.clone().requires_grad_()
    value = loss(restored, OTHER)
    value.backward()
    assert value == 0 and restored.grad.isfinite().all()


def test_symmetric(loss):
    there, back = loss(CLIP, OTHER).item(), loss(OTHER, CLIP).item()
    assert there > 0 and there == pytest.approx(back)


def test_more_blur_is_farther(loss):
    truth = texture(3, size=32)
    found = [loss(blurred(truth, times), truth).item() for times in (0, 1, 3)]
    assert found == sorted(found) and found[1] > 1e-4


def test_more_disorder_is_farther(loss):
    """Frames of equal quality in another order: as they are, neighbours swapped, halves swapped."""
    truth = texture(3, size=32)
    orders = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 4, 3, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3]]
    found = [loss(truth[:, order], truth).item() for order in orders]
    assert found == sorted(found) and found[1] > 1e-4


def test_the_formula(name, files, trained):
    """Angles between features, the mean of the taps: LPIPS's sum of squares between vectors of length 1."""
    with torch.no_grad():
        pairs = list(zip(*(trained[name].features(clip) for clip in (CLIP, OTHER)), strict=True))
    lengths = [(F.normalize(x, dim=2) - F.normalize(y, dim=2)).square().sum(2).mean().item() for x, y in pairs]
    angles = [(2 - 2 * F.cosine_similarity(x, y, dim=2)).mean().item() for x, y in pairs]
    assert lengths == pytest.approx(angles, rel=1e-4)
    arguments = {"network": section(name), "weights": files[name]}
    squares = ActionLoss(**arguments, taps=(1, 3), loss_weight=0.5)
    assert squares(CLIP, OTHER) == pytest.approx(0.5 * (lengths[0] + lengths[2]) / 2, rel=1e-3)
    x, y = pairs[1]
    expected = (F.normalize(x, dim=2) - F.normalize(y, dim=2)).abs().mean().item() * x.shape[2] ** 0.5
    absolute = ActionLoss(**arguments, taps=(2,), distance="l1", loss_weight=1.0)
    assert absolute(CLIP, OTHER) == pytest.approx(expected, rel=1e-3)


def test_clips_of_a_batch_are_averaged(loss):
    restored, truth = torch.cat([CLIP, texture(3, size=32)]), torch.cat([OTHER, CLIP])
    single = [loss(restored[i : i + 1], truth[i : i + 1]).item() for i in range(2)]
    assert loss(restored, truth) == pytest.approx(sum(single) / 2, rel=1e-4)


@pytest.mark.parametrize("frames", [1, 5])
def test_any_number_of_frames(name, loss, frames):
    """The last one is repeated where the network takes groups of four."""
    restored, truth = CLIP[:, :frames], OTHER[:, :frames]
    value = loss(restored, truth)
    assert value.isfinite() and value > 0
    if name.startswith("dtf"):
        index = [*range(frames), *[frames - 1] * (-frames % 4)]
        assert value == pytest.approx(loss(restored[:, index], truth[:, index]).item())


def test_any_size(name, loss):
    """The middle counts where sides must divide; less than that is refused."""
    restored, truth = seeded_clip(1, 4, 3, 37, 45, seed=4), seeded_clip(1, 4, 3, 37, 45, seed=5)
    cuts = {"dtf_transformer": (slice(0, 36), slice(0, 44)), "atm_clip": (slice(2, 34), slice(2, 42))}
    rows, columns = cuts.get(name, (slice(None), slice(None)))
    assert loss(restored, truth) == pytest.approx(loss(restored[..., rows, columns], truth[..., rows, columns]).item())
    if name in cuts:
        side = {"dtf_transformer": 4, "atm_clip": 8}[name]
        with pytest.raises(ValueError, match=f"{name} needs frames of at least {side}x{side} px, got 3x45$"):
            loss(restored[..., :3, :], truth[..., :3, :])


# ---- what stays frozen


def test_only_the_restored_clip_learns(loss):
    restored, truth = CLIP.clone().requires_grad_(), OTHER.clone().requires_grad_()
    value = loss(restored, truth)
    value.backward()
    assert truth.grad is None and all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert restored.grad.isfinite().all() and restored.grad.abs().amax((2, 3, 4)).all(), "of every frame"
    step = 1e-4 * restored.grad / restored.grad.norm()
    assert loss((restored - step).detach(), truth) < value


def test_training_mode_changes_nothing(loss):
    before = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    expected = loss(CLIP, OTHER)
    assert torch.equal(loss.train()(CLIP, OTHER), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loss.state_dict().items())


def test_float32_whatever_comes_in(loss):
    restored = CLIP.bfloat16()
    expected = loss(restored.float(), OTHER)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(restored, OTHER)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_building_it_leaves_random_numbers_alone(name, files):
    before = torch.get_rng_state()
    ActionLoss(network=section(name), weights=files[name])
    assert torch.equal(torch.get_rng_state(), before)


# ---- files


@pytest.mark.parametrize("form", ["ours", "half", "published", "wrapped"])
def test_files_of_weights(name, trained, tmp_path, form):
    network = trained[name]
    expected = network.state_dict()
    if form in ("ours", "half"):
        state: dict[str, Any] = expected
    elif name == "atm_resnet":
        pytest.skip("has no published weights")
    else:
        state = network.export_published()
    if form == "half":
        expected = {key: x.half().to(x.dtype) if x.is_floating_point() else x for key, x in expected.items()}
        state = {"state_dict": {key: x.half() if x.is_floating_point() else x for key, x in state.items()}}
    if form == "wrapped":
        wrapper = "module" if name == "atm_clip" else "model"
        state = {wrapper: {f"module.{key}": tensor for key, tensor in state.items()}}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    loaded = ActionLoss(network=section(name), weights=str(path)).distance
    found = loaded.network.state_dict()
    assert not loaded.inflated and found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in expected.items())


def test_weights_of_an_image_network_are_told(tmp_path):
    """With them DTF sees one frame of four, and the protocol says whose weights they are."""
    path = tmp_path / "resnet.pth"
    torch.save(backbone({**section("atm_resnet"), "after": []}).state_dict(), path)
    metric = ActionDistance(network=section("dtf_net"), weights=str(path))
    assert "of an image network" in metric.describe()
    restored = CLIP.clone().requires_grad_()
    ActionLoss(network=section("dtf_net"), weights=str(path))(restored, OTHER).backward()
    assert restored.grad.abs().amax((0, 2, 3, 4)).bool().tolist() == [False, False, True, False] * 2


def test_what_cannot_be_loaded(files, tmp_path):
    def refusal(weights: str, **changed: object) -> str:
        with pytest.raises(ValueError) as caught:
            ActionLoss(network={**section("dtf_net"), **changed}, weights=weights)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere.pth: no such file" in refusal("nowhere.pth")
    (tmp_path / "half.pth").write_bytes(b"half a file")
    assert "half.pth: " in refusal(str(tmp_path / "half.pth"))
    assert "atm_clip.safetensors: " in refusal(files["atm_clip"])
    assert "dtf_net.safetensors: weights of another network" in refusal(files["dtf_net"], width=16)
    assert "dtf_net.safetensors: weights of another network" in refusal(files["dtf_net"], clip_length=16)


# ---- the metric, and both through options


def test_a_value_a_window(files):
    arguments = {"network": section("dtf_net"), "weights": files["dtf_net"]}
    metric = construct(METRICS, Component("action_distance", {**arguments, "window": 7}), "val.metrics.action")
    assert isinstance(metric, Metric) and metric.frames == 7 and not metric.higher_is_better
    restored, truth = CLIP[0], OTHER[0]
    before = restored.clone()
    values = metric(restored, truth)
    assert values.dtype == torch.float64 and not values.requires_grad and torch.equal(restored, before)
    loss = construct(LOSSES, Component("ActionLoss", {**arguments, "loss_weight": 1.0}), "train.losses.action")
    windows = [loss(CLIP[:, i : i + 7], OTHER[:, i : i + 7]).item() for i in range(2)]
    assert values.tolist() == pytest.approx(windows)
    assert metric(truth, truth).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"action \(dtf_net\) needs clips of at least 7 frames, got 4: set window"):
        metric(restored[:4], truth[:4])
    with unchecked(), pytest.raises(ValueError, match="differ in shape"):
        metric(restored, truth[:5])


@pytest.mark.parametrize("name", ["dtf_net", "atm_clip"])
def test_what_stands_beside_the_figure(name, files):
    metric = ActionDistance(network=section(name), weights=files[name], taps=(1, 2))
    assert metric.frames == 8, "what the weights are for"
    assert (metric.label, metric.unit, metric.digits) == (f"action ({name})", "", 4)
    for word in (f"stages 1, 2 of {name}", f"{name}.safetensors (SHA-256 ", "windows of 8 frames", "mean squared"):
        assert word in metric.describe()
    assert ("multiples of 8" in metric.describe()) == (name == "atm_clip")
    others = [{"taps": (1,)}, {"taps": (1, 2), "distance": "l1"}, {"taps": (1, 2), "window": 4}]
    described = {ActionDistance(network=section(name), weights=files[name], **keys).describe() for keys in others}
    assert len(described | {metric.describe()}) == 4


@pytest.mark.parametrize(("table", "kind"), [(LOSSES, "ActionLoss"), (METRICS, "action_distance")])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": None}, "the key weights is missing: a trained checkpoint of the network is needed"),
        ({"network": "dtf_net"}, "network='dtf_net': expected a section whose key type is one of dtf_net, dtf_tr"),
        ({"network": {"type": "dtf_net", "dept": 50}}, "network: these keys build no dtf_net: .*'dept'"),
        ({"network": {"type": "dtf_net", "depth": 51}}, "build no dtf_net: depth=51 is none of 50, 101"),
        ({"network": {"type": "atm_clip"}}, "build no atm_clip: .*'classes'"),
        ({"taps": (0, 1)}, r"taps=\(0, 1\) are not stages 1\.\.4 of dtf_net"),
        ({"taps": 5}, r"taps=5 are not stages"),
        ({"distance": "l2"}, "distance='l2' is neither 'mse' nor 'l1'"),
        ({"netwerk": 1}, "unknown key 'netwerk'.*did you mean 'network'"),
    ],
)
def test_bad_options(files, table, kind, keys, message):
    arguments = {"network": section("dtf_net"), "weights": files["dtf_net"], **keys}
    with unchecked(), pytest.raises(OptionError, match=message) as caught:
        construct(table, Component(kind, arguments), "here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_numbers_out_of_range(files):
    with pytest.raises(ValueError, match="window=0 must be at least 1 frame"):
        ActionDistance(network=section("dtf_net"), weights=files["dtf_net"], window=0)
    with pytest.raises(ValueError, match=r"taps=\(1, 2, 3\) are not stages 1\.\.2 of atm_clip"):
        ActionLoss(network={**section("atm_clip"), "taps": [1, 2]}, weights=files["atm_clip"])


# ---- the scale that the docstring tells


def test_scale_of_random_weights(monkeypatch):
    """DTF-Net-50 on a moving 1/f texture with a white error of 0.02: 20 times pixel L1."""
    monkeypatch.setattr(action_distance, "load_backbone", lambda network, _: train(network, texture(5)))
    torch.manual_seed(0)
    loss = ActionLoss(network={"type": "dtf_net", "clip_length": 8}, weights="none", loss_weight=1.0)
    truth = texture(2)
    restored = truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert loss(restored, truth) == pytest.approx(20 * L1Loss()(restored, truth).item(), rel=0.1)
