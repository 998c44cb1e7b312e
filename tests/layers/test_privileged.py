"""Privileged training: a teacher that sees the truth, a student that learns its features, and nothing of it ships."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import OPTIONS, run, weights
from tiny import COMPACT, PUBLISHED, RECURRENT, awaken, seeded_clip, unchecked
from torch import Tensor, nn
from torch.testing import assert_close

import train as command
from archs import STDAN, VideoNet
from archs.layers.blocks import BicubicUpsample, conv3x3, per_frame, zero
from archs.layers.privileged import FeatureDistillation, FeatureListener, PrivilegedFeatures
from restore.checkpoint import load_network, read_info
from restore.options import load_options
from restore.privileged_training import PrivilegedStudent, PrivilegedTeacher, load_teacher, save_teacher, shipped
from restore.sample import low_resolution, sample_clip
from restore.training import prepared

CASES = {"published": PUBLISHED, "compact": COMPACT, "recurrent": RECURRENT}
every_stdan = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)


def stdan(arguments: dict[str, Any] = RECURRENT, seed: int = 0) -> STDAN:
    torch.manual_seed(seed)
    return STDAN(**{**arguments, "drop_path": 0.0})


def clips() -> tuple[Tensor, Tensor]:
    """Noise of the right sizes: two input frames, three of the truth."""
    return seeded_clip(1, 2, 3, 16, 16), seeded_clip(1, 3, 3, 64, 64, seed=1)


def footage() -> tuple[Tensor, Tensor]:
    truth = sample_clip(3, 64, 96, seed=1)[None]
    return low_resolution(truth, time_scale=1), truth


class MeanOfTime(nn.Module):
    """Adds to every frame what all have in common."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Small(VideoNet):
    """A network of another kind that has the parts: milliseconds a step."""

    scale = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.aggregate, self.decoder = conv3x3(3, 12), MeanOfTime(), conv3x3(12, 12)
        self.upsample, self.skip = zero(conv3x3(12, 48)), BicubicUpsample(4)

    def forward(self, clip: Tensor) -> Tensor:
        decoded = per_frame(self.decoder, self.aggregate(per_frame(self.encoder, clip)).relu())
        detail = nn.functional.pixel_shuffle(per_frame(self.upsample, decoded.relu()), 4)
        return per_frame(self.skip, clip) + detail


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def student_of(teacher: PrivilegedTeacher) -> PrivilegedStudent:
    network = deepcopy(teacher.network) if isinstance(teacher.network, Small) else stdan()
    network.load_state_dict(teacher.network.state_dict())
    return PrivilegedStudent(network, teacher)


def fit(network: VideoNet, steps: int, weight: float = 0.0) -> list[float]:
    """Train on one piece of footage; the pixel L1 by step, or with a weight the distillation."""
    clip, truth = footage()
    torch.manual_seed(2)
    network.train()
    inputs = (clip,) if isinstance(network, Small) else (clip, truth)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (network(*inputs) - truth).abs().mean()
        told = network.auxiliary_losses().get("privileged", torch.zeros(()))
        (loss + weight * told).backward()
        history.append(told.item() if weight else loss.item())
        optimizer.step()
    return history


# ---- the teacher


@every_stdan
def test_a_fresh_teacher_is_its_network(arguments):
    clip, truth = clips()
    network = awaken(stdan(arguments)).eval()
    expected = network(clip)
    teacher = PrivilegedTeacher(network)
    for mode in (True, False):
        assert torch.equal(teacher.train(mode)(clip, truth), expected)
    assert torch.equal(teacher(clip), expected)
    assert not network.training


def test_what_a_teacher_sees():
    """The truth at the times of the input, at its own place; noise in training only; nothing without a truth."""
    clip, truth = clips()
    teacher = awaken(PrivilegedTeacher(stdan())).eval()
    blind, seeing = teacher(clip), teacher(clip, truth)
    assert not torch.equal(blind, seeing) and torch.equal(teacher(clip), blind)
    assert torch.equal(teacher.network(clip), blind)
    other = truth.clone()
    other[:, 1] = 0.5  # between the two
    assert torch.equal(teacher(clip, other), seeing)
    other[:, 0] = 0.5
    assert not torch.equal(teacher(clip, other), seeing)
    teacher.train()
    assert not torch.equal(teacher(clip, truth), teacher(clip, truth))


def test_the_path_is_narrow():
    path = awaken(PrivilegedFeatures(8, 4, bottleneck=2), 0.5).eval()
    features = path(100 * seeded_clip(64, 3, 64, 64)).movedim(1, 0).flatten(1)
    features = features - path.widen.bias[:, None]
    assert path.widen.weight.abs().sum() * 1.0001 > features.abs().max(), "the code lies within -1..1"
    patches = nn.functional.unfold(path(seeded_clip(1, 3, 64, 64)), 1)[0]
    assert torch.linalg.matrix_rank(patches - patches.mean(1, keepdim=True)) <= 8
    for wrong in ({"bottleneck": 0}, {"noise": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrivilegedFeatures(8, 4, **wrong)


def test_the_truth_helps_the_teacher():
    """The same network from the same start, with and without: the one that sees the truth comes closer to it."""
    without = fit(small(), 120)
    teacher = fit(PrivilegedTeacher(small()), 120)
    assert teacher[0] == without[0]
    assert teacher[-1] < 0.92 * without[-1]


def test_a_teacher_survives_the_disk(tmp_path):
    clip, truth = clips()
    teacher = awaken(PrivilegedTeacher(stdan(), bottleneck=3, noise=0.2)).eval()
    save_teacher(tmp_path / "teacher.safetensors", teacher, {"type": "stdan", **RECURRENT})
    loaded = load_teacher(tmp_path / "teacher.safetensors").eval()
    assert loaded.privileged.noise == 0.2
    assert torch.equal(loaded(clip, truth), teacher(clip, truth))


# ---- the student


def test_the_student_learns_the_teachers_features():
    teacher = PrivilegedTeacher(small())
    fit(teacher, 40)
    student = student_of(teacher)
    before = deepcopy(teacher.state_dict())
    told = fit(student, 60, weight=1e-2)
    assert told[-1] < told[0] - 1
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_gradients_of_the_distillation():
    """They reach the adapters and the network up to its decoder; the picture does not depend on any of it."""
    clip, truth = clips()
    student = student_of(awaken(PrivilegedTeacher(stdan()))).train()
    restored = student(clip, truth)
    assert torch.equal(restored, student.network(clip)) and torch.equal(restored, student(clip))
    student(clip, truth)
    student.auxiliary_losses()["privileged"].backward()
    reached = {key for key, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    adapters = {key for key, _ in student.named_parameters() if key.startswith("distillation.")}
    assert adapters <= reached and "network.encoder.enter.weight" in reached
    assert not any(key.startswith(("teacher.", "network.upsample.")) for key in reached)


def test_nothing_is_left_in_what_ships():
    student = student_of(PrivilegedTeacher(stdan()))
    assert shipped(student) is student.network and shipped(student.network) is student.network
    plain = stdan(seed=5)
    plain.load_state_dict(shipped(student).state_dict(), strict=True)
    clip, _ = clips()
    assert torch.equal(plain.eval()(clip), shipped(student).eval()(clip))


def test_a_copy_hears_itself():
    """The moving average is a deep copy: neither may hear the other or hold on to its features."""
    clip, truth = clips()
    student = student_of(awaken(PrivilegedTeacher(stdan()))).train()
    copy = deepcopy(student)
    for parameter in copy.network.parameters():
        parameter.data.mul_(1.5)
    copy(clip, truth)
    assert not student.auxiliary_losses()
    other = copy.auxiliary_losses()["privileged"]
    student(clip, truth)
    assert not torch.equal(student.auxiliary_losses()["privileged"], other)
    assert student.features.heard is None and student.teacher.features.heard is None


def test_a_teacher_may_be_wider_but_not_of_another_scale():
    clip, truth = clips()
    wide = PrivilegedTeacher(stdan({**RECURRENT, "channels": 12}))
    student = PrivilegedStudent(stdan(), wide)
    student(clip, truth)
    assert student.auxiliary_losses()["privileged"].isfinite()
    network = stdan({**RECURRENT, "time_scale": 1})
    with pytest.raises(ValueError, match="time_scale"):
        PrivilegedStudent(network, wide)


def test_the_figure_is_that_of_pisr():
    distillation = FeatureDistillation({"a": 2}, {"a": 3})
    features, taught = {"a": seeded_clip(1, 2, 4, 4)}, {"a": seeded_clip(1, 3, 4, 4, seed=1)}
    adapter = distillation.adapters["a"]
    b = 0.1 * nn.functional.softplus(adapter.scale(features["a"])) + 1e-8
    expected = ((2 * b).log() + (adapter.mean(features["a"]) - taught["a"]).abs() / b).mean()
    assert_close(distillation(features, taught), expected)


class Blur(VideoNet):
    """A network without most of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = conv3x3(3, 3)

    def forward(self, clip: Tensor) -> Tensor:
        return per_frame(self.encoder, clip)


def test_networks_without_the_parts():
    with pytest.raises(ValueError, match="Blur has no aggregate and no decoder"):
        PrivilegedTeacher(Blur())
    listener = FeatureListener(network := Blur(), ["encoder"])
    listener.listen()
    network(seeded_clip(2, 3, 3, 8, 8))
    assert listener.stop()["encoder"].shape == (6, 3, 8, 8) and listener.stop() == {}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_one_graph(role):
    clip, truth = footage()
    with unchecked():
        teacher = awaken(PrivilegedTeacher(small(), noise=0.0)).train()
        network = teacher if role == "teacher" else student_of(teacher).train()
        expected, losses = network(clip, truth), network.auxiliary_losses()
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        assert_close(compiled(clip, truth), expected)
        assert_close(network.auxiliary_losses(), losses)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_in_parallel(role):
    """DistributedDataParallel reduces the gradient of every parameter once, those that only the loss needs included."""
    clip, truth = footage()
    teacher = awaken(PrivilegedTeacher(small()))
    network = awaken(teacher if role == "teacher" else student_of(teacher)).train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network)
        for _ in range(2):
            network.zero_grad()
            restored = model(clip, truth)
            (restored.mean() + sum(network.auxiliary_losses().values())).backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.requires_grad)


# ---- runs


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher's run."""
    file = tmp_path_factory.mktemp("teacher") / "tiny.yml"
    file.write_text(OPTIONS)
    return run(file, "train.privileged={role: teacher, bottleneck: 2}", "train.optim_g.lr=5e-3")


def as_student(taught: Path, iteration: int = 6) -> str:
    return f"train.privileged={{role: student, teacher: {taught}/models/teacher_{iteration}.safetensors}}"


def test_what_a_teachers_run_leaves(taught):
    """Its network, which can be used without a truth, and the teacher with the moving average of all its weights."""
    teacher, network = load_teacher(taught / "models" / "teacher_6.safetensors"), weights(taught, 6)
    assert teacher.privileged.narrow.out_channels == 2 and teacher.privileged.widen.weight.any()
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(value, network[key]), key
    assert read_info(taught / "models" / "net_g_6.safetensors")["validation"]["val"]["psnr"] > 10


def test_a_student_starts_from_its_teacher(taught, options_file):
    started = prepared(load_options(options_file, [as_student(taught)])).run
    for key, value in weights(taught, 6).items():
        assert torch.equal(shipped(started.network).state_dict()[key], value), key
    path = taught / "models" / "net_g_3.safetensors"
    overrides = [as_student(taught), f"path.pretrain_network_g={path}"]
    elsewhere = prepared(load_options(options_file, overrides)).run
    for key, value in weights(taught, 3).items():
        assert torch.equal(shipped(elsewhere.network).state_dict()[key], value), key


def test_a_students_run(taught, options_file):
    """What it leaves is a plain network; stopped and continued, everything is as if it never stopped."""
    whole = run(options_file, as_student(taught), folder="whole")
    run(options_file, as_student(taught), "train.total_iter=3", folder="parts")
    parts = run(options_file, as_student(taught), folder="parts")
    states = [torch.load(folder / "training_states" / "0000006.state") for folder in (whole, parts)]
    adapters = [key for key in states[0]["network"] if key.startswith("distillation.")]
    half_way = torch.load(whole / "training_states" / "0000003.state")["network"]
    assert adapters and not any(torch.equal(states[0]["network"][key], half_way[key]) for key in adapters)
    for part in ("network", "average"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all("privileged" in record for record in records if "loss" in record)
    assert not list((whole / "models").glob("teacher*"))
    network = load_network(whole / "models" / "net_g_6.safetensors")
    assert type(network) is STDAN and network.state_dict().keys() == weights(taught, 6).keys()


def test_a_teachers_run_continues(taught, options_file):
    arguments = ["train.privileged={role: teacher, bottleneck: 2}", "train.optim_g.lr=5e-3"]
    run(options_file, *arguments, "train.total_iter=3")
    parts = load_teacher(run(options_file, *arguments) / "models" / "teacher_6.safetensors").state_dict()
    for key, value in load_teacher(taught / "models" / "teacher_6.safetensors").state_dict().items():
        assert torch.equal(value, parts[key]), key


def test_other_ways_to_train_give_the_same(taught, options_file):
    shared = [as_student(taught), "train.total_iter=2", "val.val_freq=null"]
    plain = run(options_file, *shared)
    again = run(options_file, *shared, "train.activation_checkpointing=true", folder="less")
    for key, value in weights(plain, 2).items():
        assert torch.equal(value, weights(again, 2)[key]), key


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.privileged={role: student}"], "train.privileged.teacher: a student needs its teacher"),
        (["train.privileged={role: teacher, teacher: x}"], "train.privileged.teacher: a teacher has none"),
        (["train.privileged={role: pupil}"], "train.privileged.role: 'pupil' is none of teacher, student"),
        (["train.privileged={}"], "train.privileged.role: is required"),
        (["train.privileged={role: teacher, noisy: 1}"], "did you mean 'noise'?"),
        (["train.privileged={role: teacher, bottleneck: 0}"], "train.privileged.bottleneck: 0 must be at least 1"),
        (["train.privileged={role: student, teacher: nowhere.safetensors}"], "train.privileged: nowhere.safetensors"),
        (["train.privileged={role: student, teacher: stdan_s}"], "not a teacher"),
        (["train.privileged={role: teacher}", "find_unused_parameters=true"], "find_unused_parameters:"),
    ],
)
def test_bad_options_are_one_line(overrides, says, options_file, capsys):
    arguments = [part for override in overrides for part in ("--set", override)]
    with unchecked():
        assert command.main(["-opt", str(options_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_a_student_of_another_size(taught, options_file, capsys):
    arguments = ["--set", as_student(taught), "--set", "network_g.channels=16"]
    assert command.main(["-opt", str(options_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert "train.privileged: " in error and "weights of another network" in error and error.count("\n") == 1
