"""Our networks and data sets in the real BasicSR: built by name, trained, validated and tested by its own scripts."""

import math
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import referees
import torch
from tiny import COMPACT, ROOT, run_python

from archs import ARCHS, STDAN
from restore import basicsr_bridge
from restore.basicsr_bridge import main, register
from restore.checkpoint import load_network, save_network
from restore.data import DATASETS
from restore.test_sets import TEST_SETS

EXAMPLE = ROOT / "options" / "basicsr" / "stdan.yml"
TINY = {
    "channels": 8, "embed_dim": 8, "heads": 1, "encoder_depths": [1], "decoder_depths": [1], "levels": 1,
    "deform_groups": 1, "upsampler": "light", "skip": "bicubic",
}  # fmt: skip

# BasicSR's validation needs a GPU: it takes its copies of a sample, and room for figures, to be there
NO_GPU = """
import os, sys, torch, referees
referees.basicsr("train")
from basicsr.models.sr_model import SRModel
feed, zeros = SRModel.feed_data, torch.zeros
SRModel.feed_data = lambda model, data: feed(model, {**data, "lq": data["lq"].clone(), "gt": data["gt"].clone()})
torch.zeros = lambda *sizes, device=None, **how: zeros(*sizes, device="cpu" if device == "cuda" else device, **how)
torch.set_num_threads(1)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two clips of seven frames as Vimeo-90K has them, which any folder of clips may be."""
    root = tmp_path_factory.mktemp("vimeo")
    for number, clip in enumerate(("00001/0001", "00001/0002")):
        folder = root / "sequences" / clip
        folder.mkdir(parents=True)
        for i in range(7):
            noise = np.random.default_rng((number, i)).integers(0, 256, (40, 72, 3))
            cv2.imwrite(str(folder / f"im{i + 1}.png"), noise)
    (root / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    return root


@pytest.fixture(scope="module")
def registered() -> None:
    referees.basicsr("archs")
    register()


def section(clips: Path, **changed: Any) -> dict[str, Any]:
    """A section datasets.train as BasicSR hands it over."""
    return {
        "name": "mine", "type": "RestoreClipFolder", "phase": "train", "scale": 4, "io_backend": {"type": "disk"},
        "dataroot_gt": str(clips), "num_frame": 3, "gt_size": 32, "num_worker_per_gpu": 0, "batch_size_per_gpu": 4,
        "dataset_enlarge_ratio": 3, "use_shuffle": True, "prefetch_mode": None, "pin_memory": False, **changed,
    }  # fmt: skip


def crops(clips: Path, epochs: int, *, seed: int = 3, rank: int = 0, ranks: int = 1, **changed: Any) -> list[list[str]]:
    """The names of the crops of each epoch, by BasicSR's own seeding, data set, sampler, loader and prefetcher."""
    opt = section(clips, **changed)
    data = referees.basicsr("data")
    referees.basicsr("utils").set_random_seed(seed + rank)
    dataset = data.build_dataset(opt)
    sampler = referees.basicsr("data.data_sampler").EnlargedSampler(dataset, ranks, rank, opt["dataset_enlarge_ratio"])
    loader = data.build_dataloader(dataset, opt, num_gpu=0, dist=ranks > 1, sampler=sampler, seed=seed)
    prefetcher = referees.basicsr("data.prefetch_dataloader").CPUPrefetcher(loader)
    names = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        prefetcher.reset()
        batches = iter(prefetcher.next, None)
        names.append([key for batch in batches for key in batch["key"]])
    return names


def test_networks_are_built_by_name(registered):
    build_network = referees.basicsr("archs").build_network
    network = build_network({"type": "stdan", **COMPACT, "encoder_depths": [2], "decoder_depths": [1]})  # YAML's lists
    network.load_state_dict(STDAN(**COMPACT).state_dict())
    assert network.encoder.groups[0].blocks[1].shift and type(network) is STDAN
    with pytest.raises(ValueError, match=r"network_g: unknown key 'chanels' for stdan; did you mean 'channels'"):
        build_network({"type": "stdan", "chanels": 8})


def test_all_names_are_registered_once(registered):
    registry = referees.basicsr("utils.registry")
    before = [dict(iter(table)) for table in (registry.ARCH_REGISTRY, registry.DATASET_REGISTRY)]
    assert set(ARCHS) <= set(before[0]) and "EDVR" in before[0]
    ours = {*(f"Restore{name}" for name in DATASETS), *(f"RestoreTest_{name}" for name in TEST_SETS)}
    assert ours <= set(before[1]) and "REDSDataset" in before[1]
    register()
    assert [dict(iter(table)) for table in (registry.ARCH_REGISTRY, registry.DATASET_REGISTRY)] == before


def test_a_name_that_is_taken(registered, monkeypatch):
    """Nothing is registered then, not even what stands before it."""
    monkeypatch.setattr(basicsr_bridge, "ARCHS", {"new": STDAN, "EDVR": STDAN})
    with pytest.raises(ValueError, match=r"already knows 'EDVR', from basicsr\.archs\.edvr_arch"):
        register()
    assert "new" not in referees.basicsr("utils.registry").ARCH_REGISTRY


def test_samples_are_what_the_models_take(registered, clips):
    dataset = referees.basicsr("data").build_dataset(section(clips))
    sample = dataset[0]
    assert set(sample) == {"lq", "gt", "key"}
    assert sample["lq"].shape == (2, 3, 8, 8) and sample["gt"].shape == (3, 3, 32, 32)
    assert sample["gt"].min() >= 0 and sample["gt"].max() <= 1 and sample["gt"].dtype == torch.float32
    assert len(dataset) == 10 and dataset.opt["name"] == "mine"
    assert len(pickle.loads(pickle.dumps(dataset))[3]) == 3  # BasicSR starts workers by spawn where it is distributed


@pytest.mark.parametrize("workers", [{}, {"num_worker_per_gpu": 2}, {"num_worker_per_gpu": 1, "prefetch_mode": "cpu"}])
def test_crops_are_fresh_in_every_epoch_and_come_again_with_the_seed(registered, clips, workers):
    epochs = crops(clips, 2, **workers)
    assert [len(epoch) for epoch in epochs] == [28, 28]
    places = 10 * 3 * 11  # stretches and positions: of 56 independent draws about 5 come twice
    assert len({name for epoch in epochs for name in epoch}) > 56 * (1 - 56 / places)
    assert Counter(epochs[0]) != Counter(epochs[1])
    assert crops(clips, 2, **workers) == epochs
    assert crops(clips, 1, seed=4, **workers) != epochs[:1]


def test_ranks_see_different_crops(registered, clips):
    first, second = (crops(clips, 1, rank=rank, ranks=2, num_worker_per_gpu=1)[0] for rank in range(2))
    assert len(first) == len(second) == 12
    assert len({*first, *second}) > 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gt_sise": 32}, r"datasets\.train: unknown key 'gt_sise' for ClipFolder; did you mean 'gt_size'"),
        ({"dataset_enlarge_ratio": 0.1}, r"datasets\.train\.dataset_enlarge_ratio: 10 stretches .* no batch of 4"),
        ({"batch_size_per_gpu": 0}, r"datasets\.train\.batch_size_per_gpu: 0 must be at least 1"),
        ({"io_backend": {"type": "petrel"}}, r"datasets\.train\.io_backend: 'petrel' is neither disk nor lmdb"),
        ({"phase": "val"}, r"datasets\.val\.type: RestoreClipFolder is not for phase 'val'; .* RestoreTest_folder"),
        ({"dataroot_gt": "nowhere"}, r"datasets\.train: nowhere"),
    ],
)
def test_bad_sections(registered, clips, changed, message):
    with pytest.raises(ValueError, match=message):
        referees.basicsr("data").build_dataset(section(clips, **changed))


def test_windows_of_a_test_set(registered, clips):
    opt = {"name": "mine", "type": "RestoreTest_folder", "phase": "val", "scale": 4, "dataroot_gt": str(clips)}
    dataset = referees.basicsr("data").build_dataset(opt)
    assert len(dataset) == 2
    sample = dataset[1]
    assert sample["lq"].shape == (4, 3, 8, 16) and sample["gt"].shape == (7, 3, 32, 64)  # 40x72 cut to 32
    assert Counter(dataset.data_info["folder"])[sample["folder"]] == 7
    assert sample["folder"] != dataset[0]["folder"]
    with pytest.raises(ValueError, match=r"datasets\.val: unknown key 'gt_size' for folder"):
        referees.basicsr("data").build_dataset({**opt, "gt_size": 32})
    with pytest.raises(ValueError, match=r"datasets\.val: 0001: 7 frames, but the protocol needs windows of 9"):
        referees.basicsr("data").build_dataset({**opt, "window": 9})


@pytest.fixture(scope="module")
def finished(registered, clips, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The example, made small by BasicSR's own --force_yml, trained and validated; then BasicSR's test of the result.

    In a process of its own, since BasicSR changes logging, random state and what torch does.
    """
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(clips / "sequences" / "00001" / "0001", folder / "vid4" / "calendar")
    changes = {
        "num_gpu": 0, "datasets:train:dataroot_gt": clips, "datasets:val:dataroot_gt": "vid4",
        "datasets:train:gt_size": 32, "datasets:train:num_frame": 3, "datasets:train:num_worker_per_gpu": 1,
        "datasets:train:batch_size_per_gpu": 2, "datasets:train:dataset_enlarge_ratio": 1, "train:total_iter": 8,
        "val:val_freq": 4, "logger:print_freq": 1, "logger:save_checkpoint_freq": 4, "train:ema_decay": 0.5,
        "train:pixel_opt:reduction": "mean", "datasets:val:clips": "['calendar']",
    }  # fmt: skip
    changes |= {f"network_g:{key}": str(value).replace(" ", "") for key, value in TINY.items()}
    train = ["train", "-opt", str(EXAMPLE), "--force_yml", *(f"{key}={value}" for key, value in changes.items())]
    tested = folder / "test.yml"
    tested.write_text(f"""
name: tested
model_type: VideoRecurrentModel
num_gpu: 0
manual_seed: 0
datasets: {{test: {{name: mine, type: RestoreTest_folder, dataroot_gt: {clips}, multiple_of: 8}}}}
network_g: {{type: stdan, {str(TINY).replace("'", "")[1:-1]}}}
path: {{pretrain_network_g: experiments/stdan/models/net_g_latest.pth, param_key_g: params_ema}}
val: {{save_img: true, metrics: ~}}
""")
    code = f"from restore.basicsr_bridge import main\nos.chdir({str(folder)!r})\n"
    done = run_python(NO_GPU + code + f"sys.exit(main({train}) or main(['test', '-opt', 'test.yml']))")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_training_by_basicsr(finished):
    folder, done = finished
    losses = [float(value) for value in re.findall(r"l_pix: (\S+)", done.stderr)]
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    epochs = [int(epoch) for epoch in re.findall(r"\[epoch:\s*(\d+)", done.stderr)]
    assert epochs == [0] * 5 + [1] * 3
    figures = [float(value) for value in re.findall(r"# psnr: +(\S+)", done.stderr)]
    assert len(figures) == 3 and all(4 < value < 40 for value in figures)
    images = list((folder / "results" / "tested" / "visualization" / "mine").rglob("*.png"))
    assert len(images) == 14 and cv2.imread(str(images[0])).shape == (32, 64, 3)


def test_weights_come_back(finished, tmp_path):
    """As the module says; alone the file does not tell its architecture."""
    file = finished[0] / "experiments" / "stdan" / "models" / "net_g_latest.pth"
    state = torch.load(file, weights_only=True)
    network = STDAN(**{key: tuple(value) if isinstance(value, list) else value for key, value in TINY.items()})
    assert any(not torch.equal(value, state["params"][key]) for key, value in state["params_ema"].items())
    network.load_state_dict(state["params"])
    with pytest.raises(ValueError, match="belong to no network known here"):
        load_network(file)
    save_network(tmp_path / "mine.safetensors", network, {"type": "stdan", **TINY})
    again = load_network(tmp_path / "mine.safetensors").state_dict()
    assert all(torch.equal(again[key], value) for key, value in state["params"].items())


def test_without_basicsr(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "basicsr", None)
    assert main(["train", "-opt", "any.yml"]) == 2
    message = capsys.readouterr().err
    assert "error: basicsr is not installed: install a torchvision" in message and message.count("\n") == 1


@pytest.mark.parametrize("error", [ImportError("No module named\n'torchvision'"), RuntimeError("no operator nms")])
def test_with_a_broken_basicsr(monkeypatch, error):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(basicsr_bridge.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"^basicsr cannot be imported \([^\n]*\): install [^\n]*$"):
        register()
