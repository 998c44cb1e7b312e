"""Motion distillation: what differs between two maps, bounds of mutual information, a student in the branch's place."""

import math

import pytest
import torch
from tiny import awaken, seeded_clip, unchecked
from torch import Tensor, nn
from torch.testing import assert_close

from archs.layers.motion_distillation import (
    MotionBranch,
    MotionDistillation,
    MotionStudent,
    gaussian_nll,
    info_nce,
    information_bound,
    laplace_nll,
    motion_losses,
    positive,
    temporal_gradient,
)
from archs.layers.spectral import frequencies, rfft2

SIZE = (2, 3, 16, 21)


def maps(*shape: int, seed: int = 0) -> Tensor:
    """White noise without mean."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise - noise.mean((-2, -1), keepdim=True)


# ---- frequency-temporal gradients


def test_the_linear_gradient_says_nothing_new():
    a, b = maps(*SIZE), maps(*SIZE, seed=1)
    real, imaginary = temporal_gradient(a, b, "diff").chunk(2, dim=1)
    assert_close(torch.complex(real, imaginary), rfft2(b) - rfft2(a))
    doubled = temporal_gradient(a, 2 * b, "all")[:, 6:] - temporal_gradient(a, b, "all")[:, 6:]
    assert_close(doubled[:, :3].median(), torch.tensor(math.log(2)), atol=5e-3, rtol=0)  # the others are not linear
    assert doubled[:, 3:].abs().max() < 1e-4  # the phase does not see gains


def test_phase_of_a_shift():
    """b(p) = a(p - s): exp(-2 pi i f.s), and the amplitudes do not change."""
    a = maps(*SIZE)
    b = a.roll((3, -2), (-2, -1))
    real, imaginary = temporal_gradient(a, b, "phase").chunk(2, dim=1)
    grid = frequencies(16, 21)
    expected = torch.polar(torch.ones(16, 11), -2 * math.pi * (3 * grid.fy - 2 * grid.fx)).expand(2, 3, -1, -1).clone()
    found = torch.complex(real, imaginary)
    expected[..., 0, 0] = found[..., 0, 0]  # there is no mean to have a phase
    loud = rfft2(a).abs() > 0.3
    assert loud.float().mean() > 0.9
    assert_close(found[loud], expected[loud], atol=0.02, rtol=0)
    assert temporal_gradient(a, b, "logamp").abs().max() < 1e-3


def test_amplitudes_of_a_blur():
    a = maps(*SIZE)
    b = (a + a.roll(1, -1)) / 2
    change = temporal_gradient(a, b, "logamp")
    response = torch.cos(math.pi * frequencies(16, 21).fx).log().expand_as(change)
    clear = (rfft2(a).abs() > 0.5) & (response > -1.5)
    assert_close(change[clear], response[clear], atol=0.02, rtol=0)
    assert_close(temporal_gradient(b, a, "logamp"), -change)


def test_kinds_and_empty_maps():
    a, b = maps(*SIZE), maps(*SIZE, seed=1)
    assert [temporal_gradient(a, b, kind).shape[1] for kind in ("diff", "logamp", "phase", "all")] == [6, 3, 6, 15]
    a = torch.zeros(SIZE, requires_grad=True)
    found = temporal_gradient(a, a)
    found.sum().backward()
    assert not found.any() and a.grad is not None and a.grad.isfinite().all()


@pytest.mark.parametrize("contrast", [0.0, 1e-8, 1e-4])
def test_gradients_are_bounded_where_one_map_is_flat(contrast):
    module = awaken(MotionBranch(8, window=16))
    flat, textured = (maps(1, 8, 16, 16, seed=seed) for seed in range(2))
    both = [(contrast * flat).requires_grad_(), textured.requires_grad_()]
    module(*both).square().sum().backward()
    assert all(x.grad is not None and 0 < x.grad.abs().max() < 1e4 for x in both)


@pytest.mark.parametrize("gradient", ["diff", "logamp", "phase", "all"])
def test_laws_of_the_branch(gradient):
    torch.manual_seed(0)
    branch = MotionBranch(8, gradient=gradient, window=8)
    a, b = maps(1, 8, 24, 28), maps(1, 8, 24, 28, seed=1)
    motion = branch(a, b)
    assert motion.shape == (1, 2, 24, 28)
    assert branch(a, a).abs().max() < 1e-6, "what stands still has no motion"
    assert_close(branch(5 * a, 5 * b), motion, atol=1e-4, rtol=1e-4)
    assert_close(branch(a + 1, b + 1), motion, atol=1e-4, rtol=1e-4)
    moved = branch(a.roll((4, -8), (-2, -1)), b.roll((4, -8), (-2, -1)))
    inside = (..., slice(8, -12), slice(16, -8))  # where no window has met a border, before or after
    assert_close(moved.roll((-4, 8), (-2, -1))[inside], motion[inside], atol=1e-4, rtol=1e-4)


def test_the_branch_in_half_precision():
    torch.manual_seed(0)
    branch = MotionBranch(8, window=8)
    a, b = maps(1, 8, 15, 9), maps(1, 8, 15, 9, seed=1)
    exact = branch(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        near = branch(a.bfloat16(), b.bfloat16())
    half = branch.bfloat16()(a.bfloat16(), b.bfloat16())
    for found in (near, half):
        assert found.dtype == torch.bfloat16
        assert (found - exact).abs().mean() < 0.05 * exact.abs().mean()


# ---- bounds of mutual information


def gaussians(r: float, count: int = 200_000) -> tuple[Tensor, Tensor]:
    """M and S, jointly Gaussian of variance 1 and correlation r: I(M; S) = -log(1 - r^2) / 2."""
    m, other = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    return m, r * m + math.sqrt(1 - r * r) * other


ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of a Gaussian of variance 1


@pytest.mark.parametrize(("r", "optimum", "true"), [(0.3, 0.048, 0.047), (0.8, 0.511, 0.511), (0.95, 1.162, 1.164)])
def test_the_bound_is_tight_at_its_optimum(r, optimum, true):
    """The expected figures were measured once, with other samples."""
    m, s = gaussians(r)
    assert -0.5 * math.log(1 - r * r) == pytest.approx(true, abs=5e-4)
    fit = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([fit], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gaussian_nll(m, fit[0] * s, positive(fit[1], 1.0).expand_as(m)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    slope, raw = fit.detach()
    bound = information_bound(ENTROPY, gaussian_nll(m, slope * s, positive(raw, 1.0).expand_as(m)))
    assert slope.item() == pytest.approx(r, abs=0.01)
    assert bound.item() == pytest.approx(optimum, abs=0.006) and bound.item() == pytest.approx(true, abs=0.006)


@pytest.mark.parametrize("r", [0.3, 0.8, 0.95])
def test_a_wrong_density_is_below(r):
    m, s = gaussians(r)
    v = torch.full_like(m, 1 - r * r)
    best = information_bound(ENTROPY, gaussian_nll(m, r * s, v))
    true = -0.5 * math.log(1 - r * r)
    for mu, variance in ((0.5 * r * s, v), (r * s + 0.3, v), (-r * s, v), (r * s, 2 * v), (r * s, 0.5 * v)):
        assert information_bound(ENTROPY, gaussian_nll(m, mu, variance)) < best - 0.01
    assert information_bound(ENTROPY, laplace_nll(m, r * s, (2 * v / math.pi).sqrt())) < best - 0.01
    assert best < true + 0.006


def test_densities_integrate_to_one():
    t = torch.linspace(-60, 60, 120_001)
    for nll in (laplace_nll, gaussian_nll):
        density = (-nll(t, torch.full_like(t, 0.7), torch.full_like(t, 1.9))).exp()
        assert density.sum().item() * 1e-3 == pytest.approx(1, abs=1e-3)


def test_info_nce_is_a_bound():
    for r in (0.3, 0.8, 0.95):
        m, s = (x[:20_000].view(40, 500, 1) for x in gaussians(r))
        v = torch.full((500, 1), 1 - r * r)
        bound = math.log(500) - sum(info_nce(a, r * b, v, gaussian_nll).item() for a, b in zip(m, s, strict=True)) / 40
        assert bound == pytest.approx(-0.5 * math.log(1 - r * r), abs=0.03)
    assert math.log(4) - info_nce(*(torch.tensor([[0.0], [9], [18], [27]]),) * 2, torch.ones(4, 1)) <= math.log(4)


def test_scales_are_positive_in_any_precision():
    raw = torch.tensor([-1e3, -20.0, 0, 50], dtype=torch.float16)
    assert (positive(raw, 0.1) > 0).all() and positive(raw, 0.1).dtype == torch.float32


# ---- the module


def distilled(**keywords: str) -> MotionDistillation:
    torch.manual_seed(0)
    return MotionDistillation(8, window=8, **keywords)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return maps(2, 8, 16, 16), maps(2, 8, 16, 16, seed=1), maps(2, 8, 16, 16, seed=2)


@pytest.mark.parametrize("motion", ["explicit", "distilled", "student"])
def test_a_fresh_one_changes_nothing(motion):
    module = distilled(motion=motion)
    for mode in (True, False):
        assert not module.train(mode)(*inputs()).any()


def test_inference_needs_no_branch():
    """The frames may be anything: the student sees offset features only, and the branch may be dropped."""
    module = awaken(distilled()).eval()
    a, b, offsets = inputs()
    found = module(a, b, offsets)
    assert torch.equal(module(b, 2 * a, offsets), found) and module.distillation is None
    whole = {key for key in module.state_dict() if not key.startswith(("branch.", "student.scale."))}
    module.drop()
    assert torch.equal(module(a, b, offsets), found)
    assert module.state_dict().keys() == whole
    shipped = distilled(motion="student")
    shipped.load_state_dict(module.state_dict())
    assert torch.equal(shipped.eval()(a, b, offsets), found)
    shipped.train()(a, b, offsets)
    assert shipped.distillation is None


def test_training_shows_the_motion():
    """M goes on as it is, and its loss teaches the student and the offset features, not the branch."""
    module = awaken(distilled()).train()
    a, b, offsets = inputs()
    explicit = awaken(distilled(motion="explicit"))
    explicit.load_state_dict({key: value for key, value in module.state_dict().items() if "student" not in key})
    assert torch.equal(module(a, b, offsets), explicit(a, b, offsets))
    offsets.requires_grad_()
    module(a, b, offsets)
    assert module.distillation is not None and module.distillation.isfinite()
    module.distillation.backward()
    silent = {key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {key for key in module.state_dict() if key.startswith(("branch.", "add."))}
    assert offsets.grad is not None and offsets.grad.any()


@pytest.mark.parametrize("motion", ["explicit", "student"])
def test_gradient_reaches_every_parameter(motion):
    module = awaken(distilled(motion=motion)).train()
    module(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("loss", ["laplace", "gaussian", "infonce"])
def test_the_student_learns(loss):
    """Offset features that hold the motion tell it, and noise does not."""
    module = awaken(distilled(loss=loss)).train()
    a, b, _ = inputs()
    with torch.no_grad():
        assert module.branch is not None
        motion = module.branch(a, b)
    telling = torch.cat([motion, maps(2, 6, 16, 16, seed=3)], dim=1)
    optimizer = torch.optim.Adam(module.student.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        module(a, b, telling)
        assert module.distillation is not None
        module.distillation.backward()
        losses.append(module.distillation.item())
        optimizer.step()
    module(a, b, maps(2, 8, 16, 16, seed=4))
    assert losses[-1] < losses[0] - 0.5 and losses[-1] < module.distillation.item() - 0.5
    mu, _ = module.student(telling)
    assert torch.corrcoef(torch.stack([mu.flatten(), motion.flatten()]))[0, 1] > 0.9


def test_losses_of_a_network():
    network = nn.ModuleList([distilled(), distilled(loss="gaussian"), distilled(motion="explicit")])
    assert motion_losses(network) == {}
    values = []
    for module in network:
        module(*inputs())
        values.append(module.distillation)
    assert values[2] is None
    assert torch.equal(motion_losses(network)["motion"], (values[0] + values[1]) / 2)
    network.eval()
    for module in network:
        module(*inputs())
    assert motion_losses(network) == {}


def test_one_graph():
    with unchecked():
        module = awaken(distilled()).train()
        expected, loss = module(*inputs()), module.distillation
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_close(compiled(*inputs()), expected)
        assert_close(module.distillation, loss)


def test_what_is_refused():
    with unchecked():
        for keywords in ({"motion": "implicit"}, {"gradient": "flow"}, {"loss": "l2"}, {"window": 7}):
            with pytest.raises(ValueError, match=next(iter(keywords))):
                MotionDistillation(8, **keywords)
    with pytest.raises(ValueError, match="explicit"):
        distilled(motion="explicit").drop()


def test_the_student_sees_single_channels():
    mu, b = MotionStudent(1)(seeded_clip(1, 1, 4, 4))
    assert b is not None and mu.shape == b.shape == (1, 1, 4, 4)
