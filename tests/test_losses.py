"""Training losses: what they measure and how large it is, and values that come from inside a network."""

import itertools
import json
from math import pi, sqrt

import pytest
import torch
from runs import run, weights
from tiny import run_python, seeded_clip, unchecked
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import train as command
from archs import ARCHS, VideoNet
from archs.layers.blocks import conv3x3, interleave
from restore.losses import (
    LOSSES,
    AuxiliaryLoss,
    CharbonnierLoss,
    FFTLoss,
    FocalFrequencyLoss,
    L1Loss,
    MSELoss,
    SpectrumEnergyLoss,
)
from restore.run import recompute_activations

SIGMA = 0.02
PICTURE_LOSSES = [name for name in LOSSES if name not in ("AuxiliaryLoss", "ActionLoss")]

every_loss = pytest.mark.parametrize("name", PICTURE_LOSSES)


def noise(*shape: int, sigma: float = SIGMA, seed: int = 1) -> Tensor:
    return sigma * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texture(size: int = 128) -> Tensor:
    """Clips (2, 3, 3, h, w) whose amplitudes fall as 1/f, of standard deviation 0.2."""
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    falling = 1 / (fy.square() + fx.square()).sqrt().clamp_min(1 / size)
    clip = torch.fft.irfft2(torch.fft.rfft2(noise(2, 3, 3, size, size, seed=2)) * falling, s=(size, size))
    clip = clip - clip.mean((-2, -1), keepdim=True)
    return 0.5 + 0.2 * clip / clip.std((-2, -1), keepdim=True)


def blurred(clip: Tensor, sigma: float) -> Tensor:
    """Gaussian blur on a torus."""
    fy, fx = torch.fft.fftfreq(clip.shape[-2])[:, None], torch.fft.rfftfreq(clip.shape[-1])
    response = torch.exp(-2 * (pi * sigma) ** 2 * (fy.square() + fx.square()))
    return torch.fft.irfft2(torch.fft.rfft2(clip) * response, s=clip.shape[-2:])


# ---- what all share


@every_loss
def test_equal_clips(name):
    """The least value, and a gradient that is finite where moduli and roots have a kink."""
    restored = seeded_clip(1, 3, 3, 15, 18).requires_grad_()
    loss = LOSSES[name]()(restored, restored.detach())
    assert loss.item() == pytest.approx(1e-3 if name == "CharbonnierLoss" else 0)
    loss.backward()
    assert not restored.grad.any()


@every_loss
@pytest.mark.parametrize("size", [(15, 18), (16, 21)])
def test_gradient_points_to_the_truth(name, size):
    restored, truth = seeded_clip(1, 3, 3, *size).requires_grad_(), seeded_clip(1, 3, 3, *size, seed=1)
    loss = LOSSES[name]()(restored, truth)
    loss.backward()
    assert loss > 0 and restored.grad.isfinite().all() and restored.grad.any()
    step = 1e-4 * restored.grad / restored.grad.norm()
    assert LOSSES[name]()(restored.detach() - step, truth) < loss


@every_loss
def test_float32_whatever_comes_in(name):
    restored, truth = seeded_clip(1, 2, 3, 16, 24).bfloat16(), seeded_clip(1, 2, 3, 16, 24, seed=1)
    expected = LOSSES[name]()(restored.float(), truth)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name]()(restored, truth)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@every_loss
def test_weight(name):
    clips = seeded_clip(1, 2, 3, 16, 24), seeded_clip(1, 2, 3, 16, 24, seed=1)
    assert LOSSES[name](loss_weight=3.0)(*clips) == pytest.approx(3 * LOSSES[name](loss_weight=1.0)(*clips).item())


@every_loss
def test_a_mean_does_not_depend_on_the_batch(name):
    restored, truth = seeded_clip(2, 2, 3, 16, 24), seeded_clip(2, 2, 3, 16, 24, seed=1)
    loss = LOSSES[name]()
    single = [loss(restored[i : i + 1], truth[i : i + 1]) for i in range(2)]
    assert loss(restored, truth) == pytest.approx(sum(single).item() / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("CharbonnierLoss", {"reduction": "max"}, "reduction='max'"),
        ("L1Loss", {"reduction": "none"}, "reduction='none'"),
        ("FFTLoss", {"norm": "forward"}, "norm='forward'"),
        ("FFTLoss", {"kind": "phase"}, "kind='phase'"),
        ("FocalFrequencyLoss", {"alpha": -1.0}, "alpha=-1"),
        ("SpectrumEnergyLoss", {"radial": 0}, "radial=0"),
        ("SpectrumEnergyLoss", {"floor": 0.0}, "floor=0"),
    ],
)
def test_bad_arguments(name, arguments, word):
    with unchecked(), pytest.raises(ValueError, match=word):
        LOSSES[name](**arguments)


# ---- pixels


def test_pixel_losses():
    a, b = torch.zeros(2, 3), torch.tensor([[1.0, -2, 0], [0, 0, 3]])
    assert L1Loss()(a, b) == 1 and L1Loss(reduction="sum")(a, b) == 6
    assert MSELoss()(a, b) == pytest.approx(14 / 6) and MSELoss(reduction="sum", loss_weight=0.5)(a, b) == 7
    assert CharbonnierLoss()(a, b) == pytest.approx(1, abs=1e-3)


# ---- scales that the docstrings tell


@pytest.mark.parametrize(("kind", "ratio"), [("modulus", sqrt(pi) / 2 / sqrt(2 / pi)), ("reim", sqrt(0.5))])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (45, 79)])
def test_scale_of_the_fft_loss(kind, ratio, size):
    """1.11 and 0.71 times the pixel L1 of white noise, and sqrt(h w) times as much without a norm."""
    error = noise(6, 3, *size)
    zero, pixel = torch.zeros_like(error), L1Loss()(error, torch.zeros_like(error)).item()
    ortho = FFTLoss(loss_weight=1.0, norm="ortho", kind=kind)(error, zero).item()
    assert ortho == pytest.approx(ratio * pixel, rel=0.02)
    backward = FFTLoss(loss_weight=1.0, norm="backward", kind=kind)(error, zero).item()
    assert backward == pytest.approx(sqrt(size[0] * size[1]) * ortho, rel=1e-5)
    if size == (128, 128):
        assert 0.1 * backward / pixel == pytest.approx({"reim": 9.1, "modulus": 14.2}[kind], abs=0.1)


def test_scale_of_squares():
    error = noise(4, 3, 128, 128)
    zero, pixel = torch.zeros_like(error), L1Loss()(error, torch.zeros_like(error)).item()
    assert MSELoss()(error, zero) == pytest.approx(1.25 * SIGMA * pixel, rel=0.02)
    focal = FocalFrequencyLoss()(error, zero)
    assert focal == pytest.approx(0.43 * SIGMA**2, rel=0.03)
    assert focal == pytest.approx(0.54 * SIGMA * pixel, rel=0.03)


def test_scale_of_the_spectrum_energy_loss():
    """It sees blur far more than noise of the same pixel L1."""
    truth, loss = texture(), SpectrumEnergyLoss(loss_weight=1.0)
    for sigma, ratio in ((0.01, 2), (0.02, 3.5), (0.05, 6.5)):
        restored = truth + noise(*truth.shape, sigma=sigma)
        assert loss(restored, truth) == pytest.approx(ratio * L1Loss()(restored, truth).item(), rel=0.15)
    for sigma, ratio in ((0.5, 42), (1, 62)):
        restored = blurred(truth, sigma)
        assert loss(restored, truth) == pytest.approx(ratio * L1Loss()(restored, truth).item(), rel=0.15)


# ---- what spectra say


def test_the_fft_loss_is_that_of_the_transforms():
    a, b = seeded_clip(2, 3, 15, 18), seeded_clip(2, 3, 15, 18, seed=1)
    published = 0.1 * (torch.fft.rfft2(a) - torch.fft.rfft2(b)).abs().mean()
    assert FFTLoss()(a, b) == pytest.approx(published.item(), rel=1e-4)


def test_an_impulse_is_the_same_at_all_frequencies():
    error, zero = torch.zeros(1, 12, 17), torch.zeros(1, 12, 17)
    error[0, 5, 3] = 0.25
    assert FFTLoss(loss_weight=1.0)(error, zero) == pytest.approx(0.25)
    assert FocalFrequencyLoss()(error, zero) == pytest.approx(MSELoss()(error, zero).item())


@pytest.mark.parametrize("size", [(12, 16), (13, 17)])
def test_parseval(size):
    """Without focus the focal loss is the MSE; with it, it is less, and what it keeps is the worst frequency."""
    error = noise(2, 3, *size)
    zero, mse = torch.zeros_like(error), MSELoss()(error, torch.zeros_like(error)).item()
    assert FocalFrequencyLoss(alpha=0.0)(error, zero) == pytest.approx(mse, rel=1e-5)
    found = [FocalFrequencyLoss(alpha=alpha)(error, zero).item() for alpha in (0.0, 1.0, 2.0)]
    assert found == sorted(found, reverse=True)
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    wave = SIGMA * torch.cos(2 * pi * (2 * rows / size[0] + 3 * columns / size[1]) + 1)[None]
    assert FocalFrequencyLoss()(wave, 0 * wave) == pytest.approx(MSELoss()(wave, 0 * wave).item(), rel=1e-4)


def test_focus_is_not_differentiated():
    """The gradient is that of weights times energies: the weights times twice the error."""
    error = noise(1, 8, 8).requires_grad_()
    FocalFrequencyLoss()(error, torch.zeros(1, 8, 8)).backward()
    spectrum = torch.fft.fft2(error.detach(), norm="ortho")
    focus = spectrum.abs() / spectrum.abs().max()
    expected = torch.fft.ifft2(2 / 64 * focus * spectrum, norm="ortho").real
    assert torch.allclose(error.grad, expected, atol=1e-7)


def test_spectrum_energy_is_of_gain_not_of_phase():
    """Twice the contrast is log 4 in every band; turning the picture around changes nothing."""
    truth = texture(64)
    loss = SpectrumEnergyLoss(loss_weight=1.0, floor=1e-12)
    assert loss(2 * truth, truth) == pytest.approx(2 * torch.tensor(2.0).log().item(), rel=1e-3)
    assert loss(truth.flip(-2, -1), truth) == pytest.approx(0, abs=1e-4)
    assert loss(truth + 0.3, truth) == pytest.approx(0, abs=1e-4)


def test_flicker_costs_more_than_a_steady_error():
    """The same gains, steady or alternating: the first term is the same, the second sees the change."""
    truth = texture(64)[:, :2].repeat(1, 2, 1, 1, 1)
    loss = SpectrumEnergyLoss(loss_weight=1.0, floor=1e-12)
    gains = {"steady": [1.1] * 4, "flicker": [1.1, 1 / 1.1] * 2}
    found = {
        name: loss((truth - 0.5) * torch.tensor(gain)[:, None, None, None], truth - 0.5).item()
        for name, gain in gains.items()
    }
    each = 2 * torch.tensor(1.1).log().item()
    assert found["steady"] == pytest.approx(each, rel=1e-3)
    assert found["flicker"] == pytest.approx(each + 0.5 * 2 * each, rel=1e-3)
    assert loss((truth - 0.5)[:, :1] * 1.1, (truth - 0.5)[:, :1]) == pytest.approx(each, rel=1e-3)


def test_directions_tell_blurs_apart():
    """The same blur along rows and along columns has the same radial energies."""
    truth = texture(64)
    along, across = (truth + truth.roll(3, dim) for dim in (-1, -2))
    radial, polar = (SpectrumEnergyLoss(loss_weight=1.0, angular=angular)(along, across) for angular in (1, 8))
    assert polar > 3 * radial


# ---- from inside the network


class Confessing(VideoNet):
    """x4 in space and x2 in time by a convolution; its auxiliary losses are of a part that no picture shows."""

    scale, time_scale = 4, 2

    def __init__(self, *, inside: bool = False) -> None:
        super().__init__()
        self.part = Part(inside)
        self.last = conv3x3(3, 3)

    def forward(self, clip: Tensor) -> Tensor:
        features, gate = self.part(clip.flatten(0, 1))
        if self.training:
            self.gate = gate
        fine = F.interpolate(clip.flatten(0, 1) + self.last(features), scale_factor=4.0).unflatten(0, clip.shape[:2])
        return interleave(fine, (fine[:, 1:] + fine[:, :-1]) / 2)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        return {"gate": self.part.gate_inside if self.part.inside else self.gate, "last": self.last.bias.square().sum()}


class Part(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.conv = conv3x3(3, 3)
        self.secret = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.conv(x))
        gate = self.secret.square().mean() + 0.1 * y.square().mean()
        if self.training and self.inside:
            self.gate_inside = gate  # in what is computed twice
        return y, gate


@pytest.fixture
def confessing(monkeypatch) -> list[str]:
    """Options of a run of such a network."""
    monkeypatch.setitem(ARCHS, "confessing", Confessing)
    return ["network_g={type: confessing}", "val.val_freq=null", "logger.print_freq=1", "train.ema_decay=0"]


def test_auxiliary_losses_train(options_file, confessing):
    """Logged by name with their weights, added to the others, and felt by parameters that only they reach."""
    gate = "train.losses={gate: {type: AuxiliaryLoss, name: gate, loss_weight: 0.5, ramp: [0, 2]}}"
    folder = run(options_file, *confessing, gate)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(r["loss"] == pytest.approx(r["pixel"] + r["gate"]) for r in records)
    assert [r["gate"] for r in records] == pytest.approx([0.25, *[0.5] * 5], rel=0.1)  # with the ramp
    assert (weights(folder, 6)["part.secret"] < 0.999).all()


def test_without_the_loss_nothing_is_trained_by_it(options_file, confessing):
    folder = run(options_file, *confessing)
    assert torch.equal(weights(folder, 6)["part.secret"], torch.ones(3))


def test_a_name_that_the_network_does_not_offer(options_file, confessing, capsys):
    overrides = [*confessing, "train.losses={gate: {type: AuxiliaryLoss, name: gat}}"]
    pairs = [item for pair in overrides for item in ("--set", pair)]
    root = options_file.parent / "runs"
    assert command.main(["-opt", str(options_file), "--set", f"path.experiments={root}", *pairs]) == 2
    error = capsys.readouterr().err
    assert "name='gat'" in error and "gate, last" in error and error.count("\n") == 1


def test_networks_offer_nothing_by_default(tiny_stdan):
    network, _ = tiny_stdan
    assert network.auxiliary_losses() == {}
    with pytest.raises(ValueError, match="it offers: none"):
        AuxiliaryLoss(name="gate")(network.auxiliary_losses())


def report_wrapped() -> None:
    """Print as JSON the gradients' norms, pictures' and auxiliary, of a step by every way to wrap a network."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    norms = {}
    clip = seeded_clip(1, 2, 3, 8, 8)
    ways = [(False, False, False), (True, False, True), (False, True, True), (True, True, True)]
    for inside, (compiled, recomputed, parallel) in itertools.product((False, True), ways):
        torch.manual_seed(0)
        network = Confessing(inside=inside)
        if recomputed:
            recompute_activations(network)
        model = torch.compile(network, backend="aot_eager") if compiled else network
        model = nn.parallel.DistributedDataParallel(model) if parallel else model
        for _ in range(2):  # the second pass finds what the first has left
            network.zero_grad()
            loss = model(clip).square().mean() + AuxiliaryLoss(name="gate")(network.auxiliary_losses())
            loss.backward()
        found = torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item()
        norms[f"inside={inside} compiled={compiled} recomputed={recomputed} parallel={parallel}"] = found
    dist.destroy_process_group()
    print(json.dumps(norms))


def test_wrapped_networks_give_the_same_gradients():
    done = run_python("import test_losses; test_losses.report_wrapped()")
    assert done.returncode == 0, done.stderr
    norms = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(norms.values()))
    assert len(norms) == 8 and norms == pytest.approx(dict.fromkeys(norms, first), rel=1e-5)
