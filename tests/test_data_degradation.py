"""Degradations of training sets: those of whole frames where that can be, after the augmentation, the same anywhere."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import run, weights

from restore.clip_sources import FrameClip, Frames, SampleError
from restore.crops import ClipCrops
from restore.data import DATASETS, ClipFolder, SampleClips, SampleNumbers, store, training_batches
from restore.degrade import bd, quantize
from restore.degrade_video import BlurDown, RealWorldDegradation
from restore.sample import sample_clip
from restore.schema import Component, OptionError, construct
from restore.writers import FrameFolderWriter

PLAIN = {"use_hflip": False, "use_rot": False, "random_reverse": False}
REAL = {"type": "real"}
BUSY = {"type": "real", "noise_prob": 1.0, "jpeg_prob": 1.0, "video_prob": 1.0, "video_prob2": 1.0}
BLURS = [
    {"type": "bd"},
    {"type": "bd", "taps": 12, "phase": "centre", "border": "replicate"},
    {"type": "bd", "taps": 21, "sigma": 3.0, "border": "symmetric"},
]


def noise(frames: int = 6, height: int = 50, width: int = 67) -> torch.Tensor:
    """Bytes that no filter takes for another place's."""
    return torch.randint(0, 256, (frames, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def crops(**changes: Any) -> ClipCrops:
    arguments = {"num_frame": 5, "gt_size": 24, **changes}
    return ClipCrops([store("a", noise(), arguments.get("scale", 4))], **arguments)


def films(**changes: Any) -> SampleClips:
    return SampleClips(**{"clips": 2, "frames": 7, "height": 64, "width": 96, "num_frame": 5, "gt_size": 32, **changes})


def place(name: str) -> tuple[int, int, int]:
    """First frame, row and column of a sample's input."""
    _, start, corner = name.split(":")
    top, left = corner.split(",")
    return int(start), int(top), int(left)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_what_sets_do_without_the_key(scale):
    """Everywhere, the borders of frames among it; a flip may tip a value that lies between two grey levels."""
    for changes, tolerance in ((PLAIN, 0.0), ({}, 1.01 / 255)):
        without, told = crops(scale=scale, **changes), crops(scale=scale, degradation={"type": "bicubic"}, **changes)
        for number in range(60):
            a, b = without[number], told[number]
            assert a["name"] == b["name"] and torch.equal(a["gt"], b["gt"])
            assert a["lq"].shape == b["lq"].shape and (a["lq"] - b["lq"]).abs().max() <= tolerance


@pytest.mark.parametrize("scale", [3, 4])
@pytest.mark.parametrize("section", BLURS, ids=str)
def test_blur_downsampling_is_that_of_the_whole_frame(section, scale):
    samples = crops(scale=scale, degradation=section, **PLAIN)
    settings = {key: value for key, value in section.items() if key != "type"}
    whole = quantize(bd(samples.clips[0].truth(range(6))[0].float().unsqueeze(0) / 255, scale, **settings))
    assert whole.shape[2:] == (50 // scale, 67 // scale)
    corners = set()
    for number in range(80):
        sample = samples[number]
        start, top, left = place(sample["name"])
        size = 24 // scale
        if start == 0:
            assert torch.equal(sample["lq"][0], whole[0, :, top : top + size, left : left + size])
            corners.add((top in (0, whole.shape[2] - size), left in (0, whole.shape[3] - size)))
    assert len(corners) > 1  # borders of the frame were among them


@pytest.mark.parametrize("section", BLURS[:2], ids=str)
def test_the_truth_is_turned_before_it_is_degraded(section):
    """The phase of a blur-downsampling is that of the truth as the network sees it."""
    samples, settings = crops(degradation=section), {key: value for key, value in section.items() if key != "type"}
    gt = [samples[number]["gt"] for number in range(40)]
    for number, truth in enumerate(gt):
        expected = quantize(bd(truth[::2], **settings))
        assert torch.equal(samples[number]["lq"][..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_a_crop_of_all_of_the_frame_is_degraded_with_its_borders():
    clip = [store("a", noise(5, 32, 32), 4)]
    sample = ClipCrops(clip, num_frame=5, gt_size=32, degradation=BlurDown())[3]
    assert torch.equal(sample["lq"], quantize(bd(sample["gt"][::2])))
    sample = ClipCrops(clip, num_frame=5, gt_size=32, degradation=REAL)[3]
    assert sample["lq"].shape == (3, 3, 8, 8)


def batches(samples: ClipCrops, workers: int) -> list[dict[str, Any]]:
    return list(training_batches(samples, SampleNumbers(0, 3, 2), workers=workers, seed=3))


def test_real_degradations_are_the_same_in_any_process_and_differ_between_samples():
    alone, in_workers = (batches(films(degradation=BUSY), workers) for workers in (0, 2))
    for one, two in zip(alone, in_workers, strict=True):
        assert one["name"] == two["name"]
        assert torch.equal(one["lq"], two["lq"]) and torch.equal(one["gt"], two["gt"])
    lq = torch.cat([batch["lq"] for batch in alone])
    assert lq.shape == (6, 3, 3, 8, 8) and lq.min() >= 0 and lq.max() <= 1 and torch.equal(lq, quantize(lq))
    still = SampleClips(clips=1, frames=5, height=32, width=32, num_frame=5, gt_size=32, degradation=REAL, **PLAIN)
    a, b = still[0], still[1]
    assert a["name"] == b["name"] and torch.equal(a["gt"], b["gt"]) and not torch.equal(a["lq"], b["lq"])


class Threads:
    """A degradation that shows how many threads it may use."""

    scale = 4

    def __call__(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return torch.full_like(quantize(bd(clip)), torch.get_num_threads() / 255)


def test_degrading_takes_one_thread():
    """With more, the last bit of a sum may be another than in a worker, and codecs make it visible."""
    torch.set_num_threads(2)
    try:
        assert (crops(degradation=Threads())[0]["lq"] * 255 == 1).all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_real_inputs_show_the_place_and_time_of_the_truth():
    """Damaged, but nearer to their own truth, reduced, than to that of any of its turns or of another time."""
    mild = {"type": "real", "noise_prob": 0.0, "resize_range": [0.8, 1.2], "resize_range2": [0.8, 1.2],
            "crf_range": [10, 20], "bitrate_prob": 0.0}  # fmt: skip
    samples = films(degradation=mild, gt_size=48)
    for number in range(30):
        sample = samples[number]
        own = torch.nn.functional.avg_pool2d(sample["gt"][::2], 4)
        others = [own.flip(0), own.flip(2), own.flip(3), own.transpose(2, 3)]
        others += [own.roll(shift, dim) for dim in (2, 3) for shift in (-2, 2)]
        error = (sample["lq"] - own).abs().mean()
        assert all(error < (sample["lq"] - other).abs().mean() for other in others), sample["name"]


def test_any_size_can_be_degraded():
    """Codecs refuse odd and small sides; what they get is padded."""
    section = {**BUSY, "video_codecs": ["libx265", "libx264", "mpeg4", "libvpx-vp9"]}
    samples = crops(degradation=section, gt_size=20)
    assert all(samples[number]["lq"].shape == (3, 3, 5, 5) for number in range(6))


class Fails:
    """A degradation of which every second call fails, as an encoder might."""

    scale = 4

    def __call__(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if rng.random() < 0.5:
            raise RuntimeError("libx264 gave 2 frames\nback for 3")
        return quantize(bd(clip))


def test_a_failing_degradation_is_told_once_and_its_sample_replaced(caplog):
    samples = crops(degradation=Fails(), skip_limit=1)
    with caplog.at_level(logging.WARNING, "restore"):
        names = [samples[number]["name"] for number in range(20)]
    assert [r.getMessage() for r in caplog.records] == ["degradation: libx264 gave 2 frames back for 3; passed over"]
    assert [crops(degradation=Fails())[number]["name"] for number in range(20)] == names
    with pytest.raises(SampleError, match="more than skip_limit=0"):
        [crops(degradation=Fails(), skip_limit=0)[number] for number in range(20)]


def write(folder: Path, seed: int) -> str:
    folder.mkdir()
    with FrameFolderWriter(folder / "clip") as writer:
        for i, frame in enumerate(sample_clip(5, 32, 48, seed=seed)):
            writer.write(str(i), frame)
    return str(folder)


def test_the_cache_keeps_no_low_resolution(tmp_path):
    arguments = {"dataroot_gt": write(tmp_path / "a", 0), "num_frame": 5, "gt_size": 24, "degradation": REAL}
    cached, lazy = ClipFolder(**arguments), ClipFolder(**arguments, cache_data=False)
    assert cached.clips[0].lq is None and films(degradation=REAL).clips[0].lq is None
    for number in range(4):
        assert torch.equal(cached[number]["lq"], lazy[number]["lq"])


def test_mixed_sets_have_their_own_degradations(tmp_path):
    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    sets = (
        {"type": "ClipFolder", "dataroot_gt": one, "degradation": {"type": "bd", "taps": 7}},
        {"type": "ClipFolder", "dataroot_gt": two},
        {"type": "ClipFolder", "dataroot_gt": two, "degradation": None},
    )
    shared = {"num_frame": 5, "gt_size": 24, "degradation": {"type": "real", "crf_range": [20, 40]}}
    samples = construct(DATASETS, Component("Mixed", {**shared, "sets": sets}), "datasets.train")
    kinds = [part._degrade for part in samples._sets]
    assert kinds == [BlurDown(taps=7), RealWorldDegradation(crf_range=(20.0, 40.0)), None]
    assert {samples[number]["lq"].shape for number in range(12)} == {(3, 3, 6, 6)}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "real", "crf_rang": [1, 2]}, r"{}: unknown key 'crf_rang' for real; did you mean 'crf_range'"),
        ({"type": "reel"}, r"{}\.type: unknown type 'reel'; did you mean 'real'"),
        ({"drift": 1.0}, r"{}: expected a section with the key 'type'"),
        ({"type": "bd", "scale": 4}, r"{}: 'scale' is that of the set"),
        ({"type": "real", "drift": "much"}, r"{}\.drift: 'much' is not a number"),
        ({"type": "real", "crf_range": [30]}, r"{}\.crf_range: expected 2 values, not 1"),
        ({"type": "real", "drift": 2}, r"{}: drift=2\.0 must be within 0\.\.1"),
        ({"type": "bd", "phase": "last"}, r"{}: phase='last'"),
        ({"type": "real", "video_codecs": ["divx"]}, r"{}: codec='divx' is none of"),
        (BlurDown(2), r"{}: it has scale=2, but its set scale=4"),
    ],
)
def test_errors_name_their_place(tmp_path, section, message):
    folder = {"type": "ClipFolder", "dataroot_gt": write(tmp_path / "a", 0)}
    small = {"num_frame": 5, "gt_size": 24}
    for train, where in (
        ({**folder, **small, "degradation": section}, "datasets.train.degradation"),
        ({"type": "Mixed", **small, "sets": (folder,), "degradation": section}, "datasets.train.degradation"),
        ({"type": "Mixed", **small, "sets": ({**folder, "degradation": section},)},
         "datasets.train.sets[0].degradation"),
    ):  # fmt: skip
        kind = str(train.pop("type"))
        with pytest.raises(OptionError, match=f"^{message.format(re.escape(where))}"):
            construct(DATASETS, Component(kind, train), "datasets.train")


@pytest.mark.parametrize(
    ("kind", "key"), [("Vimeo90K", "dataroot_lq"), ("REDS", "dataroot_lq"), ("GoPro", "lq_folder")]
)
def test_stored_low_resolution_and_degradation_exclude_each_other(kind, key):
    train = {"dataroot_gt": "datasets/none", key: "blur", "degradation": REAL}
    with pytest.raises(OptionError, match=rf"^datasets\.train: {key} and degradation exclude each other"):
        construct(DATASETS, Component(kind, train), "datasets.train")


def test_inputs_on_disk_are_not_read(tmp_path):
    """Whole frames that a degradation does not need are not decoded."""

    class Never:
        root = "never"

        def read(self, key: str) -> torch.Tensor:
            raise AssertionError(key)

    class Always:
        root = "always"

        def read(self, key: str) -> torch.Tensor:
            return noise(1)[0]

    names = tuple("abcde")
    clip = FrameClip("a", Frames(Always(), "", names), Frames(Never(), "", names))
    assert ClipCrops([clip], num_frame=5, gt_size=24, degradation={"type": "bd"})[0]["lq"].shape == (3, 3, 6, 6)


def test_a_run_with_real_degradations_continues_exactly(options_file):
    options = ["datasets.train.degradation={type: real}", "val.val_freq=null", "logger.save_checkpoint_freq=2"]
    whole = run(options_file, *options, "train.total_iter=3", folder="whole")
    run(options_file, *options, "train.total_iter=2", folder="parts")
    parts = run(options_file, *options, "train.total_iter=3", folder="parts")
    assert "type: real" in (parts / "options.yml").read_text()
    for key, value in weights(whole, 3).items():
        assert torch.equal(value, weights(parts, 3)[key]), key
