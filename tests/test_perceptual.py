import socket
import sys
import types

import pytest
import torch
from tiny import seeded_clip, unchecked
from torch import nn
from trunks import alexnet_file, lpips

from restore.metric_table import METRICS
from restore.metrics import Metric
from restore.perceptual import LPIPS, TRUNKS, PyIQA
from restore.schema import Component, OptionError, construct


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache of weights, and nobody to answer."""

    def refuse(*_):
        raise AssertionError("asks the internet")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than a weight")
def test_equals_the_package_on_the_same_weights(offline):
    package = lpips()
    alexnet_file(offline / TRUNKS["alex"])
    restored, truth = seeded_clip(2, 3, 3, 40, 56)
    expected = package.LPIPS(net="alex", verbose=False)(restored * 2 - 1, truth * 2 - 1).flatten()
    values = LPIPS()(restored, truth)
    assert values.dtype == torch.float64 and not values.requires_grad
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-6, atol=1e-7)
    assert values.min() > 0.001


def test_a_file_named_by_key(offline, tmp_path):
    lpips()
    x, y = seeded_clip(2, 1, 3, 32, 40)
    first, second = (LPIPS(weights=str(alexnet_file(tmp_path / f"{seed}.pth", seed))) for seed in (0, 1))
    assert torch.equal(first(x, x), torch.zeros(1, dtype=torch.float64))
    assert first(x, y) == first(y, x)
    assert first(x, y) != second(x, y)
    assert first.label == "LPIPS (alex)" and isinstance(first, Metric) and not first.higher_is_better
    assert "0.pth (NOT the published weights: SHA-256" in first.describe()
    assert first(x[:0], x[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"at least 32x32 px, got \(1, 3, 24, 40\)"):
        first(x[..., :24, :], x[..., :24, :])


def test_building_it_leaves_random_numbers_alone(offline):
    lpips()
    alexnet_file(offline / TRUNKS["alex"])
    before = torch.get_rng_state()
    LPIPS()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("net", TRUNKS)
def test_missing_weights_are_told_at_once(offline, net):
    lpips()
    with pytest.raises(OptionError) as caught:
        construct(METRICS, Component("lpips", {"net": net}), "val.metrics.lpips")
    message = str(caught.value)
    assert message.startswith("val.metrics.lpips: ") and "\n" not in message
    assert TRUNKS[net] in message and str(offline) in message and "key weights" in message


def test_unusable_weights(tmp_path):
    lpips()
    with pytest.raises(ValueError, match=r"no/trunk.pth: there is no such file"):
        LPIPS(weights="no/trunk.pth")
    path = tmp_path / "trunk.pth"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"trunk.pth: not a readable file of weights"):
        LPIPS(weights=str(path))
    with pytest.raises(ValueError, match=r"trunk.pth: not the trunk of this LPIPS: no features\.2\.weight"):
        LPIPS(net="vgg", weights=str(alexnet_file(path)))
    torch.save({key: value[:1] for key, value in torch.load(path).items()}, path)
    with pytest.raises(ValueError, match=r"trunk.pth: not the trunk of this LPIPS: shapes differ"):
        LPIPS(weights=str(path))
    with unchecked(), pytest.raises(ValueError, match="net='alexnet' is none of alex, vgg, squeeze"):
        LPIPS(net="alexnet")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("import torchvision_that_nobody_has.models", "needs the package torchvision_that_nobody_has: pip install"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision that fits torch .*nms"),
    ],
    ids=["missing", "unfit"],
)
def test_a_package_that_cannot_be_imported(monkeypatch, tmp_path, found, message):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "lpips.py").write_text(found)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        LPIPS()


class _FakeNetwork(nn.Module):
    """What `pyiqa.create_metric` gives, in outline."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.metric_mode, self.lower_better = mode, mode == "FR"

    def forward(self, target: torch.Tensor, ref: torch.Tensor | None = None) -> torch.Tensor:
        assert target.shape[0] == 1 and (ref is not None) == (self.metric_mode == "FR")
        return (target if ref is None else target - ref).abs().mean()[None, None]


@pytest.fixture
def pyiqa(monkeypatch):
    def create_metric(name, *, device):
        if name == "unreachable":
            raise ConnectionError("no route to host")
        return _FakeNetwork({"dists": "FR", "niqe": "NR"}[name]).to(device)

    module = types.ModuleType("pyiqa")
    module.__version__ = "0.0.0"
    module.create_metric, module.list_models = create_metric, lambda: ["dists", "niqe", "fid", "unreachable"]
    monkeypatch.setitem(sys.modules, "pyiqa", module)


@pytest.mark.usefixtures("pyiqa")
def test_metrics_of_pyiqa():
    restored, truth = seeded_clip(2, 3, 3, 16, 24)
    dists, niqe = (construct(METRICS, Component("pyiqa", {"metric": name}), "val") for name in ("dists", "niqe"))
    assert isinstance(dists, Metric) and isinstance(niqe, Metric)
    assert (dists.label, dists.higher_is_better, niqe.higher_is_better) == ("dists (pyiqa)", False, True)
    expected = (restored - truth).abs().mean((1, 2, 3)).double(), restored.mean((1, 2, 3)).double()
    for metric, values in zip((dists, niqe), expected, strict=True):
        torch.testing.assert_close(metric(restored, truth), values)
    assert "pyiqa 0.0.0" in dists.describe() and "without reference" in niqe.describe()


@pytest.mark.usefixtures("pyiqa")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distss", "no metric 'distss'; did you mean 'dists'"),
        ("zzz", r"list_models\(\) lists them"),
        ("fid", "a whole set of images"),
        ("unreachable", "cannot load the weights of unreachable: no route to host"),
    ],
)
def test_what_pyiqa_cannot_do(name, message):
    with pytest.raises(ValueError, match=message):
        PyIQA(metric=name)


def test_pyiqa_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(OptionError, match="val: the metric dists needs the package pyiqa: pip install pyiqa"):
        construct(METRICS, Component("pyiqa", {"metric": "dists"}), "val")
