"""The gate of DCT coefficients and the condition built on it: chance, gradients, what it learns, identity, graphs."""

import copy
import json
import pickle

import pytest
import torch
from tiny import awaken, relative_error, run_python, seeded_clip, unchecked
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from archs.layers.dct_gate import CompressionCondition, DCTGate, _fine

SIZES = [(16, 24), (17, 9), (45, 79), (5, 3)]
every_size = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
every_norm = pytest.mark.parametrize("norm", ["group", "batch", "none"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learnt(channels: int = 12, **options) -> DCTGate:
    """A gate whose decisions depend on what it sees, about half of them on."""
    torch.manual_seed(0)
    gate = DCTGate(channels, **options)
    torch.nn.init.normal_(gate.decide.weight)
    torch.nn.init.normal_(gate.decide.bias, std=0.3)
    return gate


def decisions(gate: DCTGate, x: Tensor) -> Tensor:
    """What evaluation switches on, (B, C)."""
    with torch.no_grad():
        return (copy.deepcopy(gate).eval().log_odds(x) > 0).float().flatten(1)


# ---- chance in training, decisions in evaluation


@every_norm
def test_a_fresh_gate_is_open_in_evaluation_and_mostly_in_training(norm):
    gate, x = DCTGate(24, norm=norm), noise(200, 24, 3, 4)
    on = gate(x).ne(0).any(-1).any(-1).float().mean()
    assert 0.84 < on < 0.9  # sigmoid(2 - 0.1) = 0.87
    assert abs(gate.on_rate - 0.87) < 0.01
    assert torch.equal(gate.eval()(x), x)


@pytest.mark.parametrize("statistic", ["mean", "magnitude"])
def test_channels_are_whole_or_gone(statistic):
    gate, x = learnt(statistic=statistic), noise(6, 12, 3, 4)
    for mode in (True, False):
        result = gate.train(mode)(x)
        kept = result.detach() == x
        assert torch.equal(kept, kept[..., :1, :1].expand_as(x))
        assert kept.any() and not kept.all()
        assert not result[~kept].any()


def test_evaluation_repeats_itself_and_training_does_not():
    gate, x = learnt(), noise(6, 12, 3, 4)
    assert not torch.equal(gate(x), gate(x))
    steps, rate = gate.steps.clone(), gate.on_rate
    gate.eval()
    assert torch.equal(gate(x), gate(x))
    assert torch.equal(gate(x), x * decisions(gate, x)[..., None, None])
    assert gate.steps == steps == 2 and gate.on_rate is rate


def test_chance_follows_the_odds():
    """Hard samples have the probability of a softmax over the two logits, whatever the temperature."""
    for temperature in (5.0, 0.5):
        gate = learnt(temperatures=(temperature, temperature))
        x = noise(1, 12, 2, 2).expand(4000, -1, -1, -1)
        on = (gate(x) == x).all(-1).all(-1).float().mean(0)
        expected = gate.log_odds(x[:1]).sigmoid().flatten()
        assert_close(on, expected, atol=0.04, rtol=0)
        assert_close(gate.on_rate, expected.mean())
        assert expected.min() < 0.35 and expected.max() > 0.65


def test_pictures_of_a_batch_are_independent():
    gate, x = learnt().eval(), noise(6, 12, 3, 4)
    assert_close(gate(x)[2:3], gate(x[2:3]))


# ---- gradients


def test_gradient_is_that_of_the_relaxed_sample():
    odds = noise(3, 5, 1, 1).requires_grad_()
    gate, weights = DCTGate(5, temperatures=(2.0, 0.5), anneal_steps=2), noise(3, 5, 1, 1, seed=1)
    for temperature in (2.0, 1.0, 0.5, 0.5):
        assert_close(gate.temperature(), torch.tensor(temperature))
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad((gate._draw(odds) * weights).sum(), odds)
        torch.manual_seed(3)
        uniform = torch.rand(3, 5, 1, 1)
        soft = ((odds + (uniform / (1 - uniform)).log()) / temperature).sigmoid()
        assert_close(gradient, weights * soft * (1 - soft) / temperature)


def test_closed_channels_learn_too():
    gate, x = learnt(), noise(6, 12, 3, 4).requires_grad_()
    result = gate(x)
    (result * noise(6, 12, 3, 4, seed=2)).sum().backward()
    assert not result.flatten(2).any(-1).all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in gate.parameters())
    assert gate.decide.bias.grad.all()
    off, on = gate.decide.bias.grad.view(-1, 2).unbind(1)
    assert_close(off, -on)


# ---- annealing


def test_temperature_falls_with_training_passes_only():
    gate, x = DCTGate(8, anneal_steps=4), noise(1, 8, 2, 2)
    found = []
    for _ in range(6):
        found.append(float(gate.temperature()))
        gate.train()(x)
        gate.eval()(x)
    assert_close(torch.tensor(found), 5 * torch.tensor([1, 0.1**0.25, 0.1**0.5, 0.1**0.75, 0.1, 0.1]))
    fresh = DCTGate(8, anneal_steps=4)
    fresh.load_state_dict(gate.state_dict())
    assert fresh.temperature() == 0.5 and fresh.steps == 6
    assert fresh.to(torch.bfloat16).steps.dtype == torch.int64


# ---- what it learns


def test_the_regulariser_switches_off():
    torch.manual_seed(0)
    gate, x = DCTGate(16), noise(8, 16, 3, 3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    assert gate.auxiliary_losses() == {}
    for _ in range(30):
        gate(x)
        optimizer.zero_grad()
        gate.auxiliary_losses()["dct_on_rate"].backward()
        optimizer.step()
    assert gate.on_rate < 0.5
    assert (gate(x) == 0).float().mean() > 0.5


def train(gate: DCTGate, batch, steps: int, weight: float = 0.05) -> None:
    """Adam on the squared error of the sum of what is let through, plus the regulariser."""
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.03)
    for _ in range(steps):
        x, target = batch()
        loss = (gate(x).sum(1) - target).square().mean() + weight * gate.auxiliary_losses()["dct_on_rate"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("norm", ["group", "none"])
def test_channels_that_carry_nothing_are_switched_off(norm):
    """Of 12 channels two make up the target, five are zero, five are noise."""
    torch.manual_seed(0)
    gate = DCTGate(12, norm=norm, anneal_steps=100)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 12, 4, 4)
        x[:, 2:7] = 0
        return x, x[:, :2].sum(1)

    train(gate, batch, 150)
    on = decisions(gate, batch()[0]).mean(0)
    assert on[:2].min() == 1
    assert on[2:].max() == 0


def test_a_gate_that_sees_magnitudes_follows_the_picture():
    """Channel 0 belongs to the target where channel 1 is strong, which its mean does not tell."""
    torch.manual_seed(0)

    def batch(size: int = 16) -> tuple[Tensor, Tensor]:
        x, strong = torch.randn(size, 4, 4, 4), torch.arange(size) % 2
        x[:, 1] *= 0.1 + strong[:, None, None]
        return x, x[:, 0] * strong[:, None, None]

    share = {}
    for statistic in ("mean", "magnitude"):
        gate = DCTGate(4, statistic=statistic, norm="none", anneal_steps=150)
        train(gate, batch, 200)
        share[statistic] = float((decisions(gate, batch(200)[0])[:, 0] == torch.arange(200) % 2).float().mean())
    assert share["magnitude"] > 0.97
    assert share["mean"] < 0.75


# ---- copies, batches, mistakes


def test_copies_after_a_training_pass():
    gate, x = learnt(), noise(6, 12, 3, 4)
    gate(x)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.on_rate is None and twin.steps == 1
        assert torch.equal(twin.eval()(x), gate.eval()(x))
    assert gate.on_rate is not None


def test_one_picture_is_enough_but_for_batch_norm():
    for norm in ("group", "none"):
        assert DCTGate(8, norm=norm)(noise(1, 8, 2, 2)).isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        DCTGate(8, norm="batch")(noise(1, 8, 2, 2))


def test_mistakes_are_named():
    with unchecked():
        with pytest.raises(ValueError, match="norm='layer' is none of 'group', 'batch', 'none'"):
            DCTGate(norm="layer")
        with pytest.raises(ValueError, match="statistic='energy' is neither 'mean' nor 'magnitude'"):
            DCTGate(statistic="energy")
        with pytest.raises(ValueError, match=r"features \(1, 8, 16, 24\) and frames \(1, 3, 16, 16\) differ"):
            CompressionCondition(8)(noise(1, 8, 16, 24), seeded_clip(1, 3, 16, 16))
    with pytest.raises(ValueError, match="anneal_steps=0 must be positive"):
        DCTGate(anneal_steps=0)
    with pytest.raises(ValueError, match="100 DCT coefficients"):
        CompressionCondition(8, coefficients=100)


# ---- conditioning by compression

CONDITIONS = {
    "all": {}, "published 24": {"coefficients": 24}, "published gate": {"statistic": "mean", "norm": "batch"},
    "no norm": {"norm": "none", "coefficients": 64},
}  # fmt: skip
every_condition = pytest.mark.parametrize("case", CONDITIONS)


def condition(case: str = "all", channels: int = 8) -> CompressionCondition:
    torch.manual_seed(0)
    return CompressionCondition(channels, **CONDITIONS[case])


@every_condition
@every_size
def test_a_fresh_condition_changes_nothing(case, size):
    features, frames = noise(2, 8, *size), seeded_clip(2, 3, *size)
    for mode in (True, False):
        assert torch.equal(condition(case).train(mode)(features, frames), features)


@every_condition
def test_every_parameter_learns_within_three_steps(case):
    module = condition(case)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    features, frames, target = noise(2, 8, 32, 40), seeded_clip(2, 3, 32, 40), noise(2, 8, 32, 40, seed=1)
    reached = set()
    for _ in range(3):
        optimizer.zero_grad()
        (module(features, frames) - target).square().mean().backward()
        reached |= {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == {name for name, _ in module.named_parameters()}


@every_condition
@every_size
def test_a_learnt_condition_takes_any_size_and_depends_on_the_frame(case, size):
    module = awaken(condition(case), 0.3).eval()
    features, frames = noise(2, 8, *size), seeded_clip(2, 3, *size)
    result = module(features, frames)
    assert result.shape == features.shape and result.isfinite().all()
    assert torch.equal(result, module(features, frames))
    assert (module(features, 0.5 * frames) - result).abs().max() > 1e-3


def test_modulation_is_affine_in_the_features():
    module = awaken(condition(), 0.3).eval()
    frames, (a, b) = seeded_clip(1, 3, 17, 25), (noise(1, 8, 17, 25, seed=seed) for seed in (1, 2))
    shift = module(torch.zeros_like(a), frames)
    assert_close(module(a + 2 * b, frames) - shift, module(a, frames) + 2 * module(b, frames) - 3 * shift)


def test_a_flat_frame_is_modulated_evenly():
    module = awaken(condition(), 0.3).eval()
    result = module(torch.ones(1, 8, 50, 61), torch.full((1, 3, 50, 61), 0.4))
    inside = result[..., 12:-20, 12:-20]  # clear of blocks at the border, beyond which the convolution sees zeros
    assert_close(inside, inside[..., :1, :1].expand_as(inside), atol=1e-5, rtol=0)
    assert (inside - 1).abs().max() > 0.01


@every_size
@pytest.mark.parametrize("side", [2, 8])
def test_between_blocks_is_bilinear(size, side):
    h, w = size
    blocks = noise(2, 3, -(-h // side), -(-w // side))
    expected = F.interpolate(blocks, scale_factor=side, mode="bilinear", align_corners=False)[..., :h, :w]
    assert_close(_fine(blocks, h, w, side), expected, atol=1e-6, rtol=1e-5)


def test_features_may_lie_on_a_coarser_grid_than_the_frames():
    """One frame of constant 8x8 blocks: what a feature gets depends on where its block is, not on the grid's size."""
    module = awaken(condition(), 0.3).eval()
    frames = noise(1, 3, 6, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    fine, coarse = module(torch.ones(1, 8, 48, 64), frames), module(torch.ones(1, 8, 12, 16), frames)
    centre = fine[:, :, 1::4, 1::4] + fine[:, :, 2::4, 1::4] + fine[:, :, 1::4, 2::4] + fine[:, :, 2::4, 2::4]
    assert_close(coarse[..., 1:-1, 1:-1], (centre / 4)[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-5)


@every_condition
def test_half_precision(case):
    module = awaken(condition(case), 0.1).eval()
    features, frames = noise(2, 8, 33, 47), seeded_clip(2, 3, 33, 47)
    exact = module(features, frames).detach()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = module(features, frames).detach()
    assert under_autocast.dtype == torch.float32 and relative_error(under_autocast, exact) < 0.02
    half = copy.deepcopy(module).to(torch.bfloat16)(features.bfloat16(), frames.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half.detach(), exact) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        module.train()(features, frames).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_weights_survive():
    module = awaken(condition(), 0.1)
    features, frames = noise(2, 8, 17, 25), seeded_clip(2, 3, 17, 25)
    module(features, frames)
    fresh = CompressionCondition(8)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.eval()(features, frames), module.eval()(features, frames))
    assert fresh.gate.steps == 1 and module.auxiliary_losses()["dct_on_rate"] is module.gate.on_rate


def test_a_clip_under_activation_checkpointing_gives_the_same_gradients():
    """Recomputation draws the same gates; the one pass more that is counted moves the temperature by nothing much."""
    features, frames = noise(2, 8, 17, 25), seeded_clip(2, 3, 17, 25)
    found = []
    for recompute in (False, True):
        module = awaken(condition(), 0.1)
        torch.manual_seed(5)
        if recompute:
            result = torch.utils.checkpoint.checkpoint(module, features, frames, use_reentrant=False)
        else:
            result = module(features, frames)
        (result.square().mean() + module.auxiliary_losses()["dct_on_rate"]).backward()
        found.append([p.grad for p in module.parameters()])
    for plain, again in zip(*found, strict=True):
        assert_close(again, plain, rtol=2e-3, atol=1e-6)


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module = awaken(condition(), 0.1).eval().requires_grad_(False)
    features, frames = noise(2, 8, 45, 79), seeded_clip(2, 3, 45, 79)
    expected = module(features, frames)
    module, features, frames = module.cuda(), features.cuda(), frames.cuda()
    assert relative_error(module(features, frames).cpu(), expected) < 1e-3
    with torch.autocast("cuda", torch.float16):
        assert relative_error(module.train()(features, frames).cpu(), features.cpu()) < 1
    with torch.autocast("cuda", torch.float16):
        assert relative_error(module.eval()(features, frames).cpu(), expected) < 0.02


# ---- graphs, in a fresh interpreter: enforced annotations would break them


def report_graphs() -> None:
    """Print the relative differences that export and compile make, and what a compiled training pass leaves."""
    features, frames = noise(2, 8, 17, 25), seeded_clip(2, 3, 17, 25)
    module = awaken(condition(), 0.1).eval().requires_grad_(False)
    expected = module(features, frames)
    exported = torch.export.export(module, (features, frames)).module()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    report = {
        "export": relative_error(exported(features, frames), expected),
        "compile": relative_error(compiled(features, frames), expected),
    }
    found = []
    for wrap in (lambda module: module, lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")):
        module = awaken(condition(), 0.1)
        called = wrap(module)
        for _ in range(2):
            torch.manual_seed(5)
            result = called(features, frames)
        (result.square().mean() + module.auxiliary_losses()["dct_on_rate"]).backward()
        found.append(torch.cat([result.detach().flatten(), *(p.grad.flatten() for p in module.parameters())]))
        report[f"steps {len(found)}"] = int(module.gate.steps)
    report["training"] = relative_error(found[1], found[0])
    print(json.dumps(report))


def test_graphs_without_break_give_the_same_numbers():
    done = run_python("from layers.test_dct_gate import report_graphs; report_graphs()")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("steps 1") == report.pop("steps 2") == 2
    assert len(report) == 3 and max(report.values()) < 1e-5, report
