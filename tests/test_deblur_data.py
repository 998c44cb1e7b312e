"""Data for deblurring: every layout of the known sets is found, and blur made from sharp clips fits its truth."""

import logging
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from restore.crops import ClipCrops
from restore.data import DATASETS, SampleClips, SampleNumbers, store, training_batches
from restore.degrade import quantize
from restore.degrade_exposure import Exposure
from restore.evaluation import default_metrics, score_clip
from restore.methods import baseline
from restore.metrics import psnr
from restore.registration import register
from restore.sample import sample_clip
from restore.schema import Component, OptionError, construct
from restore.test_sets import TEST_SETS, SampleTest
from restore.trees import DVD_TEST

SHARP, BLURRED = 200, 100  # grey levels of true and of input frames
PLAIN = {"use_hflip": False, "use_rot": False, "random_reverse": False}
SMALL = {"num_frame": 3, "gt_size": 16}


def write(folder: Path, level: int, count: int = 3, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i:06d}.{suffix}"), np.full((16, 24, 3), level, np.uint8))


def tree(root: Path, sharp: str, blurred: str, *clips: str, suffix: str = "png") -> None:
    """Write clips where the two patterns of paths say."""
    for clip in clips:
        write(root / sharp.format(clip), SHARP, suffix=suffix)
        write(root / blurred.format(clip), BLURRED, suffix=suffix)


# set, keys, sharp and blurred frames below the root of the training set
LAYOUTS = [
    ("GoPro", {"lq_folder": "blur"}, "train/{}/sharp", "train/{}/blur"),
    ("GoPro", {"lq_folder": "blur_gamma"}, "{}/sharp", "{}/blur_gamma"),
    ("GoPro", {"gt_folder": "gt", "lq_folder": "blur"}, "train/gt/{}", "train/blur/{}"),
    ("GoPro", {"gt_folder": "train_GT", "lq_folder": "train_GT_blurred"}, "train_GT/{}", "train_GT_blurred/{}"),
    ("DVD", {}, "{}/GT", "{}/input"),
    ("DVD", {"gt_folder": "gt", "lq_folder": "blur"}, "train/gt/{}", "train/blur/{}"),
    ("BSD", {}, "train/{}/Sharp/RGB", "train/{}/Blur/RGB"),
    ("BSD", {}, "{}/Sharp/RGB", "{}/Blur/RGB"),
    ("REDSBlur", {}, "train/train_sharp/{}", "train/train_blur/{}"),
    ("REDSBlur", {"lq_folder": "train_blur_comp"}, "train_sharp/{}", "train_blur_comp/{}"),
]


@pytest.mark.parametrize(("kind", "keys", "sharp", "blurred"), LAYOUTS)
def test_training_sets_find_their_pairs(tmp_path, kind, keys, sharp, blurred):
    tree(tmp_path, sharp, blurred, "001", "002", suffix="jpg" if kind == "DVD" else "png")
    sizes = {"scale": 1, "time_scale": 1} if kind == "GoPro" else {}
    samples = construct(DATASETS, Component(kind, {"dataroot_gt": str(tmp_path), **SMALL, **sizes, **keys}), "train")
    assert [clip.name for clip in samples.clips] == ["001", "002"]
    sample = samples[0]
    assert sample["lq"].shape == sample["gt"].shape == (3, 3, 16, 16)
    assert (sample["gt"] * 255 - SHARP).abs().max() <= 2 and (sample["lq"] * 255 - BLURRED).abs().max() <= 2


# preset, sharp and blurred frames below the root of the test set, what the protocol says
PRESETS = [
    ("gopro", "test/{}/sharp", "test/{}/blur_gamma", "truth from sharp, input from blur_gamma"),
    ("gopro", "test_GT/{}", "test_GT_blurred/{}", "truth from test_GT, input from test_GT_blurred"),
    ("dvd", "{}/GT", "{}/input", "truth from GT, input from input"),
    ("dvd", "test/gt/{}", "test/blur/{}", "truth from gt, input from blur"),
    ("bsd", "test/{}/Sharp/RGB", "test/{}/Blur/RGB", "truth from Sharp/RGB, input from Blur/RGB"),
    ("reds_blur", "train/train_sharp/{}", "train/train_blur/{}", "input from train_blur"),
]


@pytest.mark.parametrize(("preset", "sharp", "blurred", "said"), PRESETS)
def test_presets_score_pairs_in_rgb(tmp_path, preset, sharp, blurred, said):
    tree(tmp_path, sharp, blurred, "000", "011", "015", "020")
    made = TEST_SETS[preset](dataroot_gt=str(tmp_path))
    assert [clip.name for clip in made.found] == ["000", "011", "015", "020"] and said in made.protocol.text
    protocol = made.protocol
    assert (protocol.color, protocol.scale, protocol.time_scale, protocol.crop_border) == ("rgb", 1, 1, 0)
    score = score_clip(made.found[0], protocol, baseline(protocol), default_metrics(protocol))
    assert score.mean("psnr") == pytest.approx(20 * np.log10(255 / (SHARP - BLURRED)), abs=1e-3)
    assert len(score.frames) == 3


def test_the_published_test_clips_of_dvd_are_for_testing(tmp_path, caplog):
    """They are trained on nowhere, and scored alone, where all 71 clips lie in one folder."""
    tree(tmp_path, "{}/GT", "{}/input", "IMG_0001", *DVD_TEST)
    train = DATASETS["DVD"](dataroot_gt=str(tmp_path), **SMALL)
    assert [clip.name for clip in train.clips] == ["IMG_0001"]
    with caplog.at_level(logging.WARNING, "restore"):
        test = TEST_SETS["dvd"](dataroot_gt=str(tmp_path))
    assert {clip.name for clip in test.found} == set(DVD_TEST) and len(DVD_TEST) == 10
    assert "10 clips, 30 frames; published figures are about 10 clips, 1000 frames" in caplog.text
    (tmp_path / "IMG_0001").rename(tmp_path.parent / f"{tmp_path.name}_away")
    with pytest.raises(ValueError, match="only test clips are in it: 720p_240fps_2, IMG_0003"):
        DATASETS["DVD"](dataroot_gt=str(tmp_path), **SMALL)


@pytest.mark.parametrize(
    ("kind", "looked_for", "shown"),
    [
        ("GoPro", "<clip>/sharp nor sharp/<clip>", "GOPR0372_07_00/sharp/000047.png"),
        ("DVD", "<clip>/GT nor GT/<clip>", "IMG_0001/GT/00000.jpg"),
        ("BSD", "<clip>/Sharp/RGB nor Sharp/RGB/<clip>", "000/Sharp/RGB/00000000.png"),
        ("REDSBlur", "no clips in it", "train_sharp/000/00000000.png"),
    ],
)
def test_missing_frames_are_one_line_that_says_what_was_looked_for(tmp_path, kind, looked_for, shown):
    write(tmp_path / "clip" / "Cloud", SHARP)
    for root, fault in ((tmp_path / "nowhere", "no such folder"), (tmp_path, looked_for)):
        with pytest.raises(ValueError) as error:
            DATASETS[kind](dataroot_gt=str(root), **SMALL)
        message = str(error.value)
        assert re.match(f"{root}: .*{fault}.*{kind[:4]}.* needs {shown}.*options/sample.yml$", message), message
        assert kind == "REDSBlur" or root != tmp_path or ", but clip/Cloud" in message


def test_missing_frames_of_presets(tmp_path):
    write(tmp_path / "clip" / "sharp", SHARP)
    with pytest.raises(ValueError, match=r"NAME one of blur, .*, test_GT_blurred, but clip/sharp; GoPro needs"):
        TEST_SETS["gopro"](dataroot_gt=str(tmp_path))
    tree(tmp_path, "train_sharp/{}", "train_blur/{}", "000")
    with pytest.raises(ValueError, match=r"no clip 011, 015, 020; there are 000"):
        TEST_SETS["reds_blur"](dataroot_gt=str(tmp_path))
    for key, preset in (("dataroot_lq", "folder"), ("lq_folder", "reds_blur"), ("lq_folder", "gopro")):
        with pytest.raises(ValueError, match=f"^{key} and degradation exclude each other"):
            TEST_SETS[preset](dataroot_gt=str(tmp_path), **{key: "blur"}, degradation={"type": "exposure"})


@pytest.mark.parametrize(
    ("kind", "preset", "sharp", "blurred"),
    [
        ("GoPro", "gopro", "sharp/{}", "blur/{}"),
        ("GoPro", "gopro", "{}/sharp", "{}/blur"),
        ("DVD", "dvd", "{}/GT", "{}/input"),
        ("BSD", "bsd", "{}/Sharp/RGB", "{}/Blur/RGB"),
    ],
)
def test_a_tree_one_folder_further_down_is_pointed_at(tmp_path, kind, preset, sharp, blurred):
    """As archives unpack; but nobody is pointed from training at test clips."""
    for split in ("train", "test"):
        tree(tmp_path / "archive" / split, sharp, blurred, "001")
    meant = re.escape(f"; did you mean {tmp_path / 'archive'}?; {kind} needs ")
    with pytest.raises(ValueError, match=meant):
        DATASETS[kind](dataroot_gt=str(tmp_path), **SMALL)
    with pytest.raises(ValueError, match=meant):
        TEST_SETS[preset](dataroot_gt=str(tmp_path))
    (tmp_path / "archive" / "train").rename(tmp_path / "away")
    with pytest.raises(ValueError) as error:
        DATASETS[kind](dataroot_gt=str(tmp_path / "archive"), **SMALL)
    assert "did you mean" not in str(error.value) and "but test/" in str(error.value)


def test_presets_say_which_tree_they_need(tmp_path):
    for preset, shown in (("gopro", "GOPR0372_07_00/sharp"), ("dvd", "IMG_0001/GT"), ("bsd", "000/Sharp/RGB")):
        with pytest.raises(ValueError, match=f"nowhere: no such folder; {TEST_SETS[preset].of} needs {shown}"):
            TEST_SETS[preset](dataroot_gt=str(tmp_path / "nowhere"))
    write(tmp_path / "sharp", SHARP)
    with pytest.raises(ValueError, match=r"frames in it, but sharp/\*\.png; GoPro needs"):
        TEST_SETS["gopro"](dataroot_gt=str(tmp_path), lq_folder="sharp", gt_folder="sharp")
    with pytest.raises(ValueError, match=r"no clip 000, 011, 015, 020; there are sharp$"):
        TEST_SETS["reds_blur"](dataroot_gt=str(tmp_path))


def test_names_that_differ_are_said(tmp_path, caplog):
    """Frames are paired by their order, which is wrong where a frame of one side is missing at either end."""
    tree(tmp_path, "test/{}/sharp", "test/{}/blur", "a", "b")
    with caplog.at_level(logging.WARNING, "restore"):
        assert len(TEST_SETS["gopro"](dataroot_gt=str(tmp_path))) == 2
    assert "names differ" not in caplog.text
    (tmp_path / "test/b/blur/000000.png").rename(tmp_path / "test/b/blur/000003.png")
    with caplog.at_level(logging.WARNING, "restore"):
        TEST_SETS["gopro"](dataroot_gt=str(tmp_path))
    assert "paired in order, though names differ: clip b: 000000.png and 000001.png" in caplog.text


def test_the_validation_clips_of_reds_as_pairs(tmp_path):
    """The 30 official ones, as datasets/README.md names their folders."""
    tree(tmp_path / "val", "val_sharp/{}", "val_blur/{}", "000", "001")
    made = TEST_SETS["gopro"](dataroot_gt=str(tmp_path / "val"), gt_folder="val_sharp", lq_folder="val_blur")
    assert len(made) == 2 and "truth from val_sharp, input from val_blur" in made.protocol.text


def test_the_truth_is_never_its_own_input(tmp_path):
    """Where the folder of blurred frames is missing, that of sharp ones is no substitute."""
    tree(tmp_path, "train_sharp/{}", "elsewhere/{}", "001")
    with pytest.raises(ValueError, match="clip 001: the input frames are the true ones"):
        DATASETS["REDSBlur"](dataroot_gt=str(tmp_path / "train_sharp"), **SMALL)


def films(**changes: Any) -> SampleClips:
    section = {"type": "exposure", "exposure_range": [0.0, 1.5]}
    sizes = {"clips": 1, "frames": 6, "height": 64, "width": 80, "num_frame": 5, "gt_size": 48}
    return SampleClips(**{"degradation": section, **sizes, **changes})


def test_blur_is_made_where_the_truth_is():
    """At the truth's place and time, of its size, or of a quarter of it for joint super-resolution."""
    samples = films(scale=1, time_scale=1, degradation={"type": "exposure", "exposure_range": [1.0, 1.0]})
    for number in range(3):
        sample = samples[number]
        assert sample["lq"].shape == sample["gt"].shape == (5, 3, 48, 48)
        assert psnr(sample["lq"], sample["gt"]).min() > 15 and not torch.equal(sample["lq"], sample["gt"])
        assert register(sample["lq"].mean(1), sample["gt"].mean(1)).length < 0.25
    assert films()[0]["lq"].shape == (3, 3, 12, 12)


@pytest.mark.parametrize("time_scale", [1, 2])
def test_the_blur_of_a_crop_is_that_of_the_whole_frame(time_scale):
    """Nearly: the flow of the rest of the frame is not seen. Frames in between are, though no input is made of them."""
    clip = (sample_clip(5, 96, 128, seed=1) * 255).round().byte()
    blur = Exposure(scale=1, exposure_range=(0.8, 0.8))
    sizes = {"scale": 1, "time_scale": time_scale, "num_frame": 5, "gt_size": 48}
    samples = ClipCrops([store("a", clip, 1)], degradation=blur, **sizes, **PLAIN)
    whole = blur(clip.float() / 255, np.random.default_rng(0), step=time_scale)
    for number in range(6):
        sample = samples[number]
        top, left = map(int, sample["name"].rpartition(":")[2].split(","))
        place = (..., slice(top, top + 48), slice(left, left + 48))
        sharp = sample["gt"][::time_scale]
        assert psnr(sample["lq"], whole[place]).mean() > max(40, psnr(sharp, whole[place]).mean() + 5)


def test_blur_is_the_same_in_any_process_and_differs_between_samples():
    def batches(workers: int) -> list[dict[str, Any]]:
        return list(training_batches(films(), SampleNumbers(0, 2, 2), workers=workers, seed=3))

    alone = batches(0)
    for one, two in zip(alone, batches(2), strict=True):
        assert one["name"] == two["name"] and torch.equal(one["lq"], two["lq"])
    lq = torch.cat([batch["lq"] for batch in alone])
    assert torch.equal(lq, quantize(lq)) and not torch.equal(lq[0], lq[1])
    still = films(clips=1, frames=3, height=32, width=32, num_frame=3, gt_size=32, **PLAIN)
    a, b = still[0], still[1]
    assert torch.equal(a["gt"], b["gt"]) and not torch.equal(a["lq"], b["lq"])


def test_test_sets_make_blur_that_is_part_of_their_protocol(tmp_path):
    section = {"type": "exposure", "exposure_range": [0.2, 1.0], "response": "srgb"}
    made = [SampleTest(frames=7, height=32, width=48, scale=1, time_scale=1, degradation=section) for _ in range(2)]
    protocol, clip = made[0].protocol, made[0].found[0]
    assert "Exposure(" in protocol.text and "response='srgb'" in protocol.text
    window = protocol.windows(7)[0]
    truth = protocol.truth(clip, window.frames)
    lq = protocol.inputs(clip, window, truth)
    assert lq.shape == truth.shape and not torch.equal(lq, truth)
    assert torch.equal(lq, made[1].protocol.inputs(made[1].found[0], window, truth))
    tree(tmp_path, "{}/sharp", "{}/blur", "a")
    pairs = TEST_SETS["gopro"](dataroot_gt=str(tmp_path), degradation=section)
    assert not pairs.protocol.given and "Exposure(" in pairs.protocol.text and "blur" not in pairs.note


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"exposure_range": [1, 0]}, r"{}: exposure_range=\[1\.0, 0\.0\] must be \(low, high\) within 0\.\.4"),
        ({"vary": "often"}, r"{}\.vary: 'often' is none of frame, smooth, clip"),
        ({"response": "rec709"}, r"{}\.response: 'rec709' is none of gamma, srgb, linear"),
        ({"subframe": 9}, r"{}: unknown key 'subframe' for exposure; did you mean 'subframes'"),
    ],
)
def test_errors_name_their_place(section, message):
    train = {"clips": 1, "frames": 3, "num_frame": 3, "degradation": {"type": "exposure", **section}}
    with pytest.raises(OptionError, match="^" + message.format(r"datasets\.train\.degradation")):
        construct(DATASETS, Component("SampleClips", train), "datasets.train")
