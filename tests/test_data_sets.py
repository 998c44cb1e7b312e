"""Data sets on disk: trees, databases and videos give the same samples, damaged files are passed over."""

import logging
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from restore.clip_sources import FolderStore, FrameClip, Frames, SampleError, reduced
from restore.crops import ClipCrops
from restore.data import DATASETS, REDS, ClipFolder, GoPro, Mixed, SampleNumbers, Vimeo90K, store, training_batches
from restore.lmdb_make import main as lmdb_make
from restore.lmdb_store import close_all
from restore.schema import Component, OptionError, construct
from restore.writers import VideoWriter

HEIGHT, WIDTH = 48, 64
SMALL = {"num_frame": 5, "gt_size": 16}
SEPTUPLETS = ("00001/0001", "00001/0002", "00002/0001")


@pytest.fixture(autouse=True)
def closed():
    yield
    close_all()


def frame(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise on a ramp, BGR bytes."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return (noise + np.arange(width)[:, None] * 190 // width).astype(np.uint8)


def write(folder: Path, names: list[str], seed: int = 0, **size: int) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), frame(100 * seed + i, **size))


@pytest.fixture(scope="module")
def vimeo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vimeo")
    for seed, clip in enumerate((*SEPTUPLETS, "00002/0002")):
        write(root / "sequences" / clip, [f"im{i}.png" for i in range(1, 8)], seed)
    (root / "sep_trainlist.txt").write_text("\n".join([*SEPTUPLETS, "", ""]))
    return root


@pytest.fixture(scope="module")
def databases(vimeo) -> Path:
    pytest.importorskip("lmdb")
    listing = ["--list", str(vimeo / "sep_trainlist.txt"), "--jobs", "1"]
    for name, how in {"gt": [], "raw": ["--raw"], "lq": ["--scale", "4"], "lq_raw": ["--scale", "4", "--raw"]}.items():
        assert lmdb_make([str(vimeo / "sequences"), str(vimeo / f"{name}.lmdb"), *listing, *how]) == 0
    return vimeo


def same(one: ClipCrops, two: ClipCrops, count: int = 12) -> None:
    for number in range(count):
        a, b = one[number], two[number]
        assert a["name"] == b["name"]
        assert torch.equal(a["lq"], b["lq"]) and torch.equal(a["gt"], b["gt"]), a["name"]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_resolution_of_a_crop_is_that_of_the_whole_frame(tmp_path, scale):
    ramp = torch.arange(HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH).expand(3, -1, -1).contiguous()
    images = [(ramp % 251).permute(1, 2, 0).numpy().astype(np.uint8), frame(1), frame(2)]
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    clip = FrameClip("a", Frames(FolderStore(str(tmp_path)), "", ("0.png", "1.png", "2.png")))
    whole = store("a", torch.stack(list(clip.truth(range(3)))), scale)
    arguments = {"num_frame": 3, "gt_size": 4 * scale, "scale": scale}
    same(ClipCrops([clip], **arguments), ClipCrops([whole], **arguments), 60)  # 60 places, the borders among them


def test_folders_and_videos_without_the_cache_give_what_the_cache_gives(tmp_path):
    write(tmp_path / "stills", [f"{i}.png" for i in range(9)])
    with VideoWriter(tmp_path / "film.mp4", 25) as writer:
        for i in range(9):
            writer.write(torch.from_numpy(frame(i)).permute(2, 0, 1) / 255)
    arguments = {**SMALL, "dataroot_gt": str(tmp_path), "max_frames": 8}
    cached, lazy = ClipFolder(**arguments), ClipFolder(**arguments, cache_data=False)
    assert len(cached) == len(lazy) == 2 * 4
    same(cached, lazy)
    assert len(ClipFolder(**{**arguments, "max_frames": None}, cache_data=False)) == 2 * 5


def test_septuplets_are_those_of_the_list(vimeo):
    samples = Vimeo90K(dataroot_gt=str(vimeo), **SMALL)
    assert tuple(clip.name for clip in samples.clips) == SEPTUPLETS
    assert len(samples) == 3 * 3 and samples[0]["gt"].shape == (5, 3, 16, 16)
    same(samples, Vimeo90K(dataroot_gt=str(vimeo / "sequences"), cache_data=True, **SMALL))


def test_missing_septuplets_are_told(vimeo, tmp_path, caplog):
    listing = tmp_path / "list.txt"
    listing.write_text("00001/0002/im1.png (256,448,3) 1\n\n00009/0001\n")
    with caplog.at_level(logging.WARNING, "restore"):
        assert len(Vimeo90K(dataroot_gt=str(vimeo), meta_info_file=str(listing), **SMALL).clips) == 1
    assert "1 of 2 listed clips are missing: 00009/0001" in caplog.text
    listing.write_text("00009/0001\n")
    with pytest.raises(ValueError, match=r"none of the 1 listed clips is there.*options/sample\.yml"):
        Vimeo90K(dataroot_gt=str(vimeo), meta_info_file=str(listing), **SMALL)


@pytest.mark.parametrize("kind", ["gt", "raw"])
def test_databases_of_either_layout_give_what_the_tree_gives(databases, kind):
    size = {"frame_size": (HEIGHT, WIDTH), **SMALL}
    tree = Vimeo90K(dataroot_gt=str(databases), **SMALL)
    same(tree, Vimeo90K(dataroot_gt=str(databases / f"{kind}.lmdb"), **size))
    low = "lq" if kind == "gt" else "lq_raw"
    same(tree, Vimeo90K(dataroot_gt=str(databases), dataroot_lq=str(databases / f"{low}.lmdb"), **size))


def test_a_database_without_a_list_of_keys_lists_them_itself(databases, tmp_path):
    """As the published code writes it: nothing but data.mdb, beside a pickle of keys that is left alone."""
    (tmp_path / "vimeo.lmdb").mkdir()
    (tmp_path / "vimeo.lmdb" / "data.mdb").symlink_to(databases / "raw.lmdb" / "data.mdb")
    arguments = {"dataroot_gt": str(tmp_path / "vimeo.lmdb"), "frame_size": (HEIGHT, WIDTH), **SMALL}
    same(Vimeo90K(dataroot_gt=str(databases), **SMALL), Vimeo90K(**arguments))
    with pytest.raises(ValueError, match=r"keys\.pkl: a pickle is not opened.*sep_trainlist\.txt"):
        Vimeo90K(**arguments, meta_info_file="keys.pkl")
    with pytest.raises(ValueError, match=r"9216 bytes are no 448x256 pixels.*set frame_size"):
        Vimeo90K(**{**arguments, "frame_size": (256, 448)})


def test_workers_open_a_database_of_their_own(databases):
    def names_and_sums(workers: int) -> list:
        batches = training_batches(samples, SampleNumbers(0, 3, 2), workers=workers, seed=5)
        return [(batch["name"], float(batch["gt"].sum())) for batch in batches]

    samples = Vimeo90K(dataroot_gt=str(databases / "gt.lmdb"), **SMALL)
    alone = names_and_sums(0)  # the database is open here when the workers are forked
    assert names_and_sums(2) == alone


def test_without_the_package_the_error_names_it(databases, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        Vimeo90K(dataroot_gt=str(databases / "gt.lmdb"), **SMALL)


def test_reds_keeps_its_held_out_clips_out(tmp_path):
    for seed, clip in enumerate(("000", "001", "240")):
        write(tmp_path / "train_sharp" / clip, [f"{i:08d}.png" for i in range(6)], seed)
    samples = REDS(dataroot_gt=str(tmp_path), **SMALL)
    assert [clip.name for clip in samples.clips] == ["001", "240"]
    official = REDS(dataroot_gt=str(tmp_path / "train_sharp"), val_partition="official", **SMALL)
    assert [clip.name for clip in official.clips] == ["000", "001"]
    for clip in ("001", "240"):
        small = tmp_path / "train_sharp_bicubic" / "X4" / clip
        small.mkdir(parents=True)
        for file in (tmp_path / "train_sharp" / clip).iterdir():
            low = reduced(FolderStore(str(file.parent)).read(file.name), 4).permute(1, 2, 0).numpy()
            cv2.imwrite(str(small / file.name), low[..., ::-1])
    same(samples, REDS(dataroot_gt=str(tmp_path), dataroot_lq=str(tmp_path), **SMALL))
    with pytest.raises(ValueError, match="val_partition='REDS5' is none of REDS4, official"):
        REDS(dataroot_gt=str(tmp_path), val_partition="REDS5")


@pytest.mark.parametrize("layout", ["{clip}/{kind}", "{kind}/{clip}"])
def test_sharp_and_blurred_frames_in_either_order(tmp_path, layout):
    for seed, clip in enumerate(("GOPR0372_07_00", "GOPR0372_07_01")):
        for kind in ("sharp", "blur_gamma"):
            write(tmp_path / layout.format(clip=clip, kind=kind), [f"{i:06d}.png" for i in range(5)], seed + len(kind))
    assert GoPro(dataroot_gt=str(tmp_path), **SMALL)[0]["lq"].shape == (3, 3, 4, 4)
    blurred = GoPro(dataroot_gt=str(tmp_path), lq_folder="blur_gamma", scale=1, time_scale=1, **SMALL)
    sample = blurred[0]
    assert sample["lq"].shape == sample["gt"].shape == (5, 3, 16, 16) and not torch.equal(sample["lq"], sample["gt"])
    with pytest.raises(ValueError, match="input frames of 64x48 for true frames of 64x48, but scale=4"):
        GoPro(dataroot_gt=str(tmp_path), lq_folder="blur_gamma", **SMALL)


def test_frames_keep_the_interval_that_is_drawn(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(9):
        cv2.imwrite(str(tmp_path / "a" / f"{i}.png"), np.full((16, 16, 3), 20 * i, np.uint8))
    samples = ClipFolder(dataroot_gt=str(tmp_path), num_frame=3, gt_size=16, interval_list=(1, 3), random_reverse=False)
    assert len(samples) == 7 + 3
    steps = {tuple((samples[n]["gt"][:, 0, 0, 0] * 255 / 20).round().diff().int().tolist()) for n in range(30)}
    assert steps == {(1, 1), (3, 3)}
    with pytest.raises(ValueError, match="no clip has 3 frames at an interval of 5"):
        ClipFolder(dataroot_gt=str(tmp_path), num_frame=3, gt_size=16, interval_list=(1, 5))


def mixed(tmp_path: Path, **changes) -> Mixed:
    for name in ("one", "two"):
        if not (tmp_path / name).exists():
            write(tmp_path / name / name, [f"{i}.png" for i in range(6)])
    first = {"type": "ClipFolder", "dataroot_gt": str(tmp_path / "one"), "weight": 3.0, "interval_list": [1]}
    second = {"type": "ClipFolder", "dataroot_gt": str(tmp_path / "two"), **changes}
    made = construct(DATASETS, Component("Mixed", {**SMALL, "sets": (first, second)}), "datasets.train")
    assert isinstance(made, Mixed)
    return made


def test_sets_are_mixed_by_weight(tmp_path):
    samples = mixed(tmp_path)
    names = [samples[number]["name"][:3] for number in range(200)]
    assert 130 < names.count("one") < 170 and len(samples) == 4
    assert len(samples.clips) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataroot_qt": "x"}, r"datasets\.train\.sets\[1\]: unknown key 'dataroot_qt' for ClipFolder; did you mean"),
        ({"type": "ClipFoldr"}, r"datasets\.train\.sets\[1\]\.type: unknown type 'ClipFoldr'; did you mean 'ClipFold"),
        ({"type": "Mixed"}, r"datasets\.train\.sets\[1\]\.type: unknown type 'Mixed'"),
        ({"weight": 0}, r"datasets\.train\.sets\[1\]\.weight: 0 must be more than 0"),
        ({"weight": "much"}, r"datasets\.train\.sets\[1\]\.weight: 'much' is not a number"),
        ({"gt_size": 32}, r"datasets\.train\.sets\[1\]: 'gt_size' is the same for all sets"),
        ({"dataroot_gt": "nowhere"}, r"datasets\.train\.sets\[1\]: nowhere: no such folder"),
    ],
)
def test_errors_of_mixed_sets_name_their_place(tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        mixed(tmp_path, **changes)


@pytest.mark.parametrize(
    ("make", "tree"),
    [(Vimeo90K, "sequences/00001/0001/im1.png"), (REDS, "train_sharp/000/00000000.png"), (GoPro, "sharp/000047.png")],
)
def test_missing_data_is_one_line_with_the_way_out(make, tree):
    with pytest.raises(ValueError) as error:
        make(dataroot_gt="datasets/nowhere")
    assert re.match(f"datasets/nowhere: no such folder.*{tree}.*options/sample.yml$", str(error.value))


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Six clips; one has a truncated frame, one a missing frame, one a frame of another size."""
    for seed in range(6):
        write(tmp_path / str(seed), [f"{i}.png" for i in range(5)], seed)
    (tmp_path / "0" / "3.png").write_bytes((tmp_path / "0" / "3.png").read_bytes()[:200])
    cv2.imwrite(str(tmp_path / "2" / "1.png"), frame(0, HEIGHT, 2 * WIDTH))
    return tmp_path


def test_unreadable_files_are_replaced_by_what_seed_and_number_say(damaged, caplog, capfd):
    def names(workers: int) -> list[list[str]]:
        samples = ClipFolder(dataroot_gt=str(damaged), cache_data=False, **SMALL)
        (damaged / "1" / "2.png").unlink(missing_ok=True)
        return [b["name"] for b in training_batches(samples, SampleNumbers(0, 20, 2), workers=workers, seed=1)]

    with caplog.at_level(logging.WARNING, "restore"):
        alone = names(0)
    told = sorted(record.getMessage().removeprefix(f"{damaged}/") for record in caplog.records)
    assert [line.partition(":")[0] for line in told] == ["0/3.png", "1/2.png", "2/1.png"]  # once each
    assert "128x48, but another frame of this clip is 64x48" in told[2]
    assert {name[0] for batch in alone for name in batch} == {"3", "4", "5"}
    (damaged / "1" / "2.png").write_bytes(b"")
    assert names(2) == alone
    capfd.readouterr()  # the decoder's own complaints


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_files_stop_the_run_in_one_line(damaged, workers, capfd):
    for seed in range(3, 6):
        (damaged / str(seed) / "0.png").write_bytes(b"")
    samples = ClipFolder(dataroot_gt=str(damaged), cache_data=False, skip_limit=2, **SMALL)
    with pytest.raises(SampleError) as error:
        list(DataLoader(samples, 2, sampler=range(20), num_workers=workers))
    assert re.fullmatch(r"\S+\.png: .*; more than skip_limit=2 files like this", str(error.value))
    capfd.readouterr()
