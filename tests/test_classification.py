"""Classifiers through the commands: training continues exactly, files know their classes, views, bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from action.image_networks import resnet_file
from runs import states
from tiny import ROOT, unchecked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import test as scoring
import train as training
from archs import ARCHS, CLASSIFIERS, ClipClassifier
from restore import dialects
from restore.action_scores import Guess, by_class, confusions, figures, mean_scores
from restore.action_sets import ACTION_SETS, ACTION_TEST_SETS, MovingTexturesTest
from restore.backbone_weights import load_classifier, start_classifier
from restore.checkpoint import CheckpointError, load_network, read_info, save_network
from restore.losses import CrossEntropyLoss
from restore.moving_textures import moving_textures
from restore.options import OptimizerOptions, OptionError, load_options
from restore.training import prepared
from restore.writers import FrameFolderWriter, VideoWriter

OPTIONS = """
name: tiny
num_threads: 1
device: cpu
datasets:
  train: {type: ActionFolder, dataroot: clips, num_frame: 4, size: 16, short_side: [16, 20],
          batch_size_per_gpu: 4, num_worker_per_gpu: 0}
  val: {type: ActionFolderTest, dataroot: clips, num_frame: 4, size: 16, short_side: 16, crops: 1}
network_g: {type: atm_resnet, classes: 2, depth: [1, 1, 1, 1], width: 4, after: [1], operations: [sub], hidden: 4,
            context: 3}
train: {total_iter: 4, losses: {class: {type: CrossEntropyLoss, label_smoothing: 0.1}}, ema_decay: 0.9,
        optim_g: {type: SGD, lr: 1e-2, weight_decay: 1e-4}}
val: {val_freq: 4}
logger: {print_freq: 2, save_checkpoint_freq: 2}
"""
SCORED = """
name: scored
num_threads: 1
device: cpu
datasets: {held: {type: ActionFolderTest, dataroot: clips, num_frame: 4, size: 16, short_side: 16, clips: 2}}
networks: [experiments/tiny/models/net_g_4.safetensors]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with options and two classes of clips: a video, folders of frames, and one in a folder ``frames``."""
    monkeypatch.chdir(tmp_path)
    for file, text in (("tiny.yml", OPTIONS), ("scored.yml", SCORED)):
        Path(file).write_text(text)
    made = moving_textures(["left", "right"], [2], hold=1, photos=["brick"], number=6, length=6, side=24, seed=0)
    for clip in made.clips:
        frames, number = [x.float() / 255 for x in clip.open().truth(range(6))], int(clip.name[-1])
        folder = Path("clips", "turning [left]" if clip.label == 0 else "turning right")
        if number < 2:
            folder.mkdir(parents=True)
            with VideoWriter(folder / f"{number}.mp4", fps=10) as video:
                for frame in frames:
                    video.write(frame)
            continue
        with FrameFolderWriter(folder / str(number) / ("frames" if number < 4 else "")) as writer:
            for i, frame in enumerate(frames):
                writer.write(f"{i:05d}", frame)
    return tmp_path


def train(*overrides: str, options: str = "tiny.yml") -> int:
    return training.main(["-opt", options, *(x for item in overrides for x in ("--set", item))])


def score(*overrides: str, options: str = "scored.yml", more: tuple[str, ...] = ()) -> int:
    return scoring.main(["-opt", options, *more, *(x for item in overrides for x in ("--set", item))])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def state_of(folder: str, iteration: int = 4) -> dict[str, Tensor]:
    return load_classifier(f"{folder}/tiny/models/net_g_{iteration}.safetensors")[0].state_dict()


# ---- the commands


def test_train_continue_and_score(here, capsys):
    assert train() == 0
    assert train("path.experiments=parts", "train.total_iter=2") == 0
    assert train("path.experiments=parts") == 0
    for key, value in state_of("experiments").items():
        assert torch.equal(value, state_of("parts")[key]), key
    info = read_info("experiments/tiny/models/net_g_4.safetensors")
    assert info["classes"] == ["turning [left]", "turning right"] and info["network"]["type"] == "atm_resnet"
    assert 0 <= info["validation"]["val"]["top1"] <= info["validation"]["val"]["top5"] == 100
    assert states(Path("experiments/tiny")) == [2, 4]

    capsys.readouterr()
    assert score() == 0
    said = capsys.readouterr().out
    assert "2 clips x 3 crops of 16x16 (short side 16) of 4 frames, one of each equal segment" in said
    assert "softmax averaged over 6 views" in said and "6 clips of 2 classes" in said
    record = json.loads(Path("results/scored/held.json").read_text())
    assert record["views"]["clips"] == 2 and record["views"]["crops"] == 3 and record["chance"] == 50
    (method,) = record["methods"]
    right = sum(clip["ranked"][0] == clip["label"] for clip in method["clips"])
    assert method["figures"]["top1"] == pytest.approx(100 * right / 6) and method["figures"]["top5"] == 100
    assert sum(row["clips"] for row in method["confusions"]) == 6 - right
    assert {row["class"] for row in method["classes"]} == set(info["classes"])
    rows = list(csv.DictReader(Path("results/scored/held_clips.csv").read_text().splitlines()))
    assert [row["clip"] for row in rows] == [clip["clip"] for clip in method["clips"]] and len(rows) == 6
    last = list(csv.DictReader(Path("results/scored/held_classes.csv").read_text().splitlines()))[-1]
    assert last["class"] == "all" and float(last["top1"]) == method["figures"]["top1"]
    assert Path("results/scored/held.txt").read_text() in said


def test_finished_clips_are_not_done_again(here, monkeypatch):
    assert train("train.total_iter=1", "val.val_freq=null", "name=once") == 0
    networks = "networks=[experiments/once/models/net_g_1.safetensors]"
    assert score(networks) == 0
    saved = Path("results/scored/held/net_g_1.jsonl")
    lines = saved.read_text().splitlines()
    saved.write_text("\n".join([*lines[:-2], lines[-2][:10]]))  # two clips lost, one of them half-written
    asked: list[str] = []
    views = ACTION_TEST_SETS["ActionFolderTest"].views  # type: ignore[attr-defined]
    monkeypatch.setattr(ACTION_TEST_SETS["ActionFolderTest"], "views", lambda s, c: asked.append(c.name) or views(s, c))
    first = json.loads(Path("results/scored/held.json").read_text())["methods"][0]["figures"]
    assert score(networks) == 0 and len(asked) == 2
    assert json.loads(Path("results/scored/held.json").read_text())["methods"][0]["figures"] == first
    for changed in ("datasets.held.average=logits", "datasets.held.crops=1"):
        asked.clear()
        assert score(networks, changed) == 0 and len(asked) == 6
    asked.clear()
    assert score(networks, "datasets.held.crops=1") == 0 and not asked
    assert score(networks, "datasets.held.crops=1", more=("--anew",)) == 0 and len(asked) == 6


def test_the_dry_run(here, capsys):
    assert training.main(["-opt", "tiny.yml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 x 16x16 -> 2 classes" in said and "6 clips of 2 classes" in said and "test set   val: 6 clips" in said
    assert not Path("experiments").exists()


@pytest.mark.parametrize("name", ["action_sample", "test_action"])
def test_the_shipped_options(name):
    options = load_options(Path(__file__).parents[1] / "options" / f"{name}.yml")
    if options.train:
        loop = prepared(options)
        loop.check_validation()
        assert next(iter(loop.samples))["clip"].shape == (4, 3, 16, 16)
    for section in options.test_sets.values():
        assert len(ACTION_TEST_SETS[section.type](**section.arguments))


# ---- weights


def test_other_files_are_told_apart(here, tiny_stdan):
    assert train("train.total_iter=1", "val.val_freq=null") == 0
    path = "experiments/tiny/models/net_g_1.safetensors"
    with pytest.raises(CheckpointError, match="classifier of clips"):
        load_network(path)
    save_network("stdan.safetensors", *tiny_stdan)
    with pytest.raises(CheckpointError, match="it restores"):
        load_classifier("stdan.safetensors")


def test_a_file_without_metadata_needs_the_network(here):
    assert train("train.total_iter=1", "val.val_freq=null") == 0
    network, names = load_classifier("experiments/tiny/models/net_g_1.safetensors")
    assert names == ("turning [left]", "turning right")
    torch.save(network.state_dict(), "bare.pth")
    section = load_options("tiny.yml").network_g
    assert section is not None
    again, unnamed = load_classifier("bare.pth", section.describe())
    assert unnamed is None and all(torch.equal(a, b) for a, b in zip(
        network.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip
    with pytest.raises(CheckpointError, match="give network_g"):
        load_classifier("bare.pth")
    assert score("networks=[bare.pth]", "network_g={type: atm_resnet, classes: 2, depth: [1, 1, 1, 1], width: 4, "
                 "after: [1], operations: [sub], hidden: 4, context: 3}") == 0  # fmt: skip


def test_training_starts_from_weights(here, capsys):
    """Those of a ResNet are inflated; those of other classes keep all but the last layer."""
    torch.save({**resnet_file(4, (1, 1, 1, 1))}, "resnet.pth")
    assert train("path.pretrain_network_g=resnet.pth", "train.optim_g.lr=0", "train.total_iter=1") == 0
    assert torch.allclose(state_of("experiments", 1)["layer2.0.conv2.weight"],
                          torch.load("resnet.pth")["layer2.0.conv2.weight"])  # fmt: skip
    torch.manual_seed(0)
    other = CLASSIFIERS["atm_resnet"](classes=7, depth=(1, 1, 1, 1), width=4, after=(1,), operations=("sub",),
                                      hidden=4, context=3)  # fmt: skip
    torch.save(other.state_dict(), "other.pth")
    ours = CLASSIFIERS["atm_resnet"](classes=2, depth=(1, 1, 1, 1), width=4, after=(1,), operations=("sub",),
                                     hidden=4, context=3)  # fmt: skip
    fresh = start_classifier(ours, "other.pth")
    assert fresh == ["fc.weight", "fc.bias"]
    assert torch.equal(ours.state_dict()["atm.1.0.reduce.0.weight"], other.state_dict()["atm.1.0.reduce.0.weight"])


def test_weights_for_longer_clips_are_refused_by_name(here, capsys):
    tiny = {"width": 8, "blocks": (1, 1, 1, 1), "classes": 2}
    torch.save(CLASSIFIERS["dtf_net"](clip_length=16, **tiny).state_dict(), "long.pth")
    torch.save(CLASSIFIERS["dtf_net"](clip_length=16, **tiny).export_published(), "published.pth")
    for file in ("long.pth", "published.pth"):
        network = "network_g={type: dtf_net, width: 8, blocks: [1, 1, 1, 1], classes: 2, clip_length: 4}"
        assert train(network, f"path.pretrain_network_g={file}") == 2
        assert f"{file}: weights for clips of 16 frames, but network_g.clip_length is 4" in one_line(capsys)
    network = "network_g={type: dtf_net, width: 8, blocks: [1, 1, 1, 1], classes: 2, clip_length: 16}"
    assert train(network, "path.pretrain_network_g=long.pth") == 2
    assert "4 frames, but the weights of DTFNet are for clips of 16: set num_frame: 16" in one_line(capsys)


# ---- every classifier


TINY: dict[str, dict[str, Any]] = {
    "dtf_net": {"width": 8, "blocks": (1, 1, 1, 1), "clip_length": 8, "classes": 3},
    "dtf_transformer": {
        "embed_dim": 16, "heads": (1, 1), "depths": (2, 1), "window": 4, "image_size": 32, "clip_length": 8,
        "classes": 3,
    },
    "atm_resnet": {"width": 8, "depth": (1, 1, 1, 1), "hidden": 8, "context": 3, "classes": 3},
    "atm_clip": {
        "patch": 8, "width": 16, "depth": 2, "heads": 2, "projected": 8, "atm_at": 1, "size": 32, "hidden": 8,
        "classes": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_contract(name, tmp_path):
    torch.manual_seed(0)
    network = CLASSIFIERS[name](**TINY[name])
    assert isinstance(network, ClipClassifier) and network.classes == 3
    network.check_clips(8, 32)
    clip = torch.rand(2, 8, 3, 32, 32)
    assert network(clip).shape == (2, 3)
    save_network(tmp_path / "net.safetensors", network, {"type": name, **TINY[name]}, classes=["a", "b", "c"])
    loaded, names = load_classifier(tmp_path / "net.safetensors")
    assert names == ("a", "b", "c") and type(loaded) is type(network)
    assert torch.equal(loaded(clip), network.eval()(clip))
    for frames, size in ((4, 32), (8, 30), (9, 32)):
        allowed = (not network.clip_length or frames >= network.clip_length) and not frames % network.frames_multiple_of
        if allowed and not size % network.multiple_of:
            network.check_clips(frames, size)
            network(clip[:, :1].expand(-1, frames, -1, -1, -1)[..., :size, :size])
        else:
            with pytest.raises(ValueError):
                network.check_clips(frames, size)


def test_tables_do_not_share_names():
    assert not set(ARCHS) & set(CLASSIFIERS)
    assert set(dialects.LABELLED) == set(ACTION_TEST_SETS) and not set(ACTION_SETS) & set(ACTION_TEST_SETS)


# ---- figures


class Told(ClipClassifier):
    """Logits are the clip's first pixels."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, clip: Tensor) -> Tensor:
        return clip[:, 0, :, 0, 0] * 10


def test_the_mean_over_views():
    views = torch.rand(2, 3, 4, 3, 5, 5)
    logits = views[:, :, 0, :, 0, 0].flatten(0, 1) * 10
    assert_close(mean_scores(Told().eval(), views, "softmax", "fp32"), logits.softmax(1).mean(0))
    assert_close(mean_scores(Told().eval(), views, "logits", "fp32"), logits.mean(0))


def test_figures_classes_and_confusions():
    ranked = [[0, 1, 2], [1, 0, 2], [1, 2, 0], [6, 5, 4, 3, 2]]
    found = [Guess(str(i), label, guesses, 1.0, 0.0) for i, (label, guesses) in
             enumerate(zip([0, 0, 0, 1], ranked, strict=True))]  # fmt: skip
    assert figures(found) == pytest.approx({"top1": 25, "top5": 75, "mean_class": 100 / 6})
    assert by_class(found) == [{"class": 0, "clips": 3, "top1": pytest.approx(100 / 3)},
                               {"class": 1, "clips": 1, "top1": 0}]  # fmt: skip
    assert confusions(found)[0] == {"class": 0, "taken_for": 1, "clips": 2} and len(confusions(found)) == 2
    assert all(value != value for value in figures([]).values())


def test_cross_entropy_with_smoothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert_close(CrossEntropyLoss(loss_weight=2.0, label_smoothing=0.1)(logits, labels), 2 * expected)
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropyLoss(label_smoothing=1.0)


def test_sgd(here):
    group = prepared(load_options("tiny.yml")).run.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    with pytest.raises(OptionError, match="nesterov"):
        OptimizerOptions(type="SGD", momentum=0.0)


# ---- bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("datasets.train.dataroot=nowhere", "nowhere: no such folder"),
        ("datasets.val.dataroot=nowhere", "nowhere: no such folder"),
        ("datasets.train.dataroot=hollow", "empty: a class without clips"),
        ("datasets.train.dataroot=clips/turning right", "clips/turning right/5: a class without clips"),
        ("network_g.classes=3", "2 classes, but network_g has 3: set network_g.classes: 2"),
        ("datasets.train.num_frame=0", "must be at least 1"),
        ("datasets.train.sampling=some", "neither 'segments' nor 'dense'"),
        ("datasets.train.short_side=[8, 20]", "short_side=[8, 20] must rise, from size=16 at least"),
        ("datasets.train.type=ClipFolder", "unknown type 'ClipFolder'"),
        ("datasets.val={type: SampleTest}", "unknown type 'SampleTest'"),
        ("train.losses.class.type=L1Loss", "unknown type 'L1Loss'"),
        ("train.losses.class.label_smoothing=2", "label_smoothing=2"),
        ("train.privileged={role: teacher}", "train.privileged: is for networks that restore"),
        ("train.activation_checkpointing=true", "not with classifiers"),
        ("val.metrics={psnr: {type: psnr}}", "val.metrics: is for networks that restore"),
        ("path.pretrain_network_g=nothing.pth", "nothing.pth: no such file"),
        ("datasets.train={type: ActionList, dataroot: clips, annotations: far.txt, num_frame: 4}", "label 2 of turn"),
        ("datasets.train={type: ActionList, dataroot: clips, annotations: lost.txt, num_frame: 4}", "1 of 2 clips"),
    ],
)  # fmt: skip
def test_bad_input_of_training(here, capsys, override, message):
    Path("hollow/empty").mkdir(parents=True)
    Path("far.txt").write_text("turning right/1.mp4 0\nturning right/3/frames 6 2\n")
    Path("lost.txt").write_text("turning right/1.mp4 0\nturning right/9.mp4 1\n")
    with unchecked():
        assert train(override) == 2
    assert message in one_line(capsys)
    assert not Path("experiments/tiny/models").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("networks=[]", "networks: name files"),
        ("networks=[nothing.safetensors]", "nothing.safetensors: no such file"),
        ("datasets.held.dataroot=others", "1 of 2 classes are not those of the network: c"),
        ("datasets.held.num_frame=0", "must be at least 1"),
        ("datasets.held.crops=2", "crops=2 1 or 3"),
        ("datasets.held.average=mean", "neither 'softmax' nor 'logits'"),
        ("datasets.more={type: SampleTest}", "use two options files"),
    ],
)  # fmt: skip
def test_bad_input_of_scoring(here, capsys, override, message):
    network = CLASSIFIERS["atm_resnet"](classes=2, depth=(1, 1, 1, 1), width=4, hidden=4)
    description = {"type": "atm_resnet", "classes": 2, "depth": [1, 1, 1, 1], "width": 4, "hidden": 4}
    path = "experiments/tiny/models/net_g_4.safetensors"
    save_network(path, network, description, classes=["turning [left]", "turning right"])
    for name in ("c", "turning right"):
        (Path("others") / name).mkdir(parents=True)
        (Path("others") / name / "x.mp4").write_bytes(Path("clips/turning right/1.mp4").read_bytes())
    with unchecked():
        assert score(override) == 2
    assert message in one_line(capsys)


def test_a_damaged_clip_is_named_and_the_others_go_on(here, capsys):
    Path("clips/turning right/1.mp4").write_bytes(b"no video")
    assert train("train.total_iter=2") == 0, "training passes over it"
    capsys.readouterr()
    assert score("networks=[experiments/tiny/models/net_g_2.safetensors]") == 2
    assert "1.mp4" in one_line(capsys)
    record = json.loads(Path("results/scored/held.json").read_text())
    assert len(record["methods"][0]["clips"]) == 5 and len(record["left_out"]) == 1
    assert score(more=("--claimed", "30")) == 2


def test_views_are_those_of_the_protocol():
    """Three squares along the long side, the middle one alone with crops=1, stretches evenly over time."""
    sets = [MovingTexturesTest(num_frame=2, length=9, side=20, size=16, sampling="dense", interval=2, clips=3, crops=n)
            for n in (1, 3)]  # fmt: skip
    whole = torch.stack(list(sets[0].found[0].open().truth(range(9)))).float() / 255
    one, three = (made.views(made.found[0]) for made in sets)
    assert one.shape == (3, 1, 2, 3, 16, 16) and three.shape == (3, 3, 2, 3, 16, 16)
    for clip, start in enumerate((0, 3, 6)):
        for crop, left in enumerate((0, 2, 4)):
            assert torch.equal(three[clip, crop], whole[[start, start + 2], :, 2:18, left : left + 16])
    assert torch.equal(one[:, 0], three[:, 1])


def test_two_processes(here, capsys):
    """Training shares batches and keeps one set of statistics; scoring gives the figures of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script, options in (("train.py", "tiny.yml"), ("test.py", "scored.yml")):
        command = [*launcher, str(ROOT / script), "-opt", options, "--launcher", "pytorch"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    together = json.loads(Path("results/scored/held.json").read_text())["methods"][0]
    assert score(more=("--anew",)) == 0
    alone = json.loads(Path("results/scored/held.json").read_text())["methods"][0]
    assert together["figures"] == alone["figures"] and len(alone["clips"]) == 6
    assert [clip["ranked"] for clip in together["clips"]] == [clip["ranked"] for clip in alone["clips"]]
