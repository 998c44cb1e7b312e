"""Evaluation: the published windows and baseline, metrics over windows, means, the traps of lists and clips."""

import math
import os
from pathlib import Path

import pytest
import torch
from tiny import COMPACT

from archs import ARCHS
from restore.clip_sources import StoredClip
from restore.degrade import imresize
from restore.evaluation import MetricStream, check_methods, default_metrics, evaluate, score_clip
from restore.methods import Method, baseline, bicubic_average, folder_method, names_of, network_method
from restore.metric_table import METRICS
from restore.protocol import Protocol
from restore.sample import sample_clip
from restore.scores import averages, infinite_clips, mean_over_clips, mean_over_frames
from restore.test_sets import TEST_SETS, SampleTest, Vid4
from restore.writers import FrameFolderWriter

SHARED = Path(os.environ.get("RESTORE_SHARED", Path(__file__).parents[2] / "shared"))
PROTOCOL = Protocol()
METRIC = default_metrics(PROTOCOL)


def clip(frames: torch.Tensor, name: str = "clip") -> StoredClip:
    return StoredClip(name, (frames * 255).round().byte())


def constant(value: float) -> Method:
    return Method("constant", lambda lq, name, window: torch.full((2 * len(lq) - 1, 3, 32, 32), value))


@pytest.mark.parametrize(("length", "published"), [(41, 7), (34, 6), (49, 9), (47, 8), (7, 2), (31, 6)])
def test_windows_are_the_published_ones(length, published):
    windows = PROTOCOL.windows(length)
    repeated = (length - 7) % 6 == 0  # then the program's last window is one it has done already
    assert len(windows) == published - repeated
    assert all(len(window.frames) == 7 for window in windows) and windows[-1].stop == length
    assert [frame for window in windows for frame in window.fresh] == list(range(length))
    assert [window.start for window in windows[:-1]] == [6 * i for i in range(len(windows) - 1)]


@pytest.mark.parametrize("length", [1, 7, 15, 16, 26, 27, 100, 134])
def test_windows_with_seams_in_the_middle(length):
    windows = Protocol(scale=1, time_scale=1, window=15, overlap=4, seam="middle").windows(length)
    assert [frame for window in windows for frame in window.fresh] == list(range(length))
    for window in windows:
        assert set(window.fresh) <= set(window.frames)
        edges = [window.fresh.start - window.start] * bool(window.start)
        assert all(edge >= 2 for edge in edges), "two frames beside a seam are left to the other window"


def test_protocols_that_do_not_fit():
    with pytest.raises(ValueError, match="6 frames, but the protocol needs windows of 7"):
        PROTOCOL.windows(6)
    with pytest.raises(ValueError, match="window=6 must be a multiple of time_scale=2 plus 1"):
        Protocol(window=6)
    with pytest.raises(ValueError, match="overlap=0"):
        Protocol(overlap=0)


def test_first_result_wins_and_every_frame_counts_once():
    calls = []

    def restore(lq, name, window):
        calls.append(len(lq))
        return torch.full((7, 3, 32, 32), 0.1 * len(calls))

    truth = sample_clip(10, 32, 32)
    score = score_clip(clip(truth), PROTOCOL, Method("counting", restore), METRIC)
    assert calls == [4, 4] and score.computed == 14
    assert [f.frame for f in score.frames] == list(range(10))
    first = score_clip(clip(truth[:7]), PROTOCOL, constant(0.1), METRIC)
    assert [f.values for f in score.frames[:7]] == [f.values for f in first.frames]
    # the last window starts at frame 3: there odd frames are inputs
    assert [f.synthesised for f in score.frames] == [False, True] * 3 + [False] + [False, True, False]


def test_metrics_of_two_frames_see_across_windows():
    truth = sample_clip(13, 32, 32)
    metrics = {"flicker": METRICS["flicker"](), **METRIC}
    restored = (truth + 0.1 * torch.arange(13)[:, None, None, None] % 0.2).clamp(0, 1)

    def whole(lq, name, window):
        return restored[window.start : window.stop]

    score = score_clip(clip(truth), PROTOCOL, Method("whole", whole), metrics)
    stream = MetricStream(metrics["flicker"])
    quantised = [(x * 255).round() / 255 for x in (restored, truth)]
    expected = stream.add(*quantised)
    assert "flicker" not in score.frames[0].values and expected[0] is None
    assert [f.values["flicker"] for f in score.frames[1:]] == pytest.approx(expected[1:])


def test_metrics_of_more_frames_than_a_part_has():
    """Six frames a value, parts of two, three and four: a value for every frame from the sixth on, none twice."""

    class Sixth(METRICS["flicker"]):
        frames = 6

        def __call__(self, restored, truth):
            return restored[5:].mean((1, 2, 3)).double()

    clip = torch.arange(9.0)[:, None, None, None].expand(9, 3, 4, 4)
    stream = MetricStream(Sixth())
    columns = [stream.add(part, part) for part in clip.split([2, 3, 4])]
    assert columns == [[None] * 2, [None] * 3, [5, 6, 7, 8]]


def test_perfect_frames_do_not_poison_the_mean():
    frames = (sample_clip(7, 32, 32) * 255).round() / 255
    almost = frames.clone()
    almost[0] += 0.2
    score = score_clip(clip(frames), PROTOCOL, Method("almost", lambda *_: almost), METRIC)
    assert math.isinf(score.frames[1].values["psnr"]) and math.isfinite(score.mean("psnr"))
    assert score.mean("psnr") == pytest.approx(score.frames[0].values["psnr"])


def test_black_clips_are_told_and_left_out():
    black, real = clip(torch.zeros(7, 3, 32, 32), "black"), clip(sample_clip(7, 32, 32), "real")
    scores = [score for _, score in evaluate([black, real], PROTOCOL, [baseline(PROTOCOL)], METRIC)]
    assert list(infinite_clips(scores)) == ["black"]
    assert mean_over_clips(scores, "psnr") == scores[1].mean("psnr")


def test_means_over_clips_and_over_frames_differ():
    frames = sample_clip(13, 32, 32)
    scores = [score_clip(clip(frames[:n], str(n)), PROTOCOL, baseline(PROTOCOL), METRIC) for n in (7, 13)]
    assert mean_over_clips(scores, "psnr") == pytest.approx((scores[0].mean("psnr") + scores[1].mean("psnr")) / 2)
    over_frames = (7 * scores[0].mean("psnr") + 13 * scores[1].mean("psnr")) / 20
    assert mean_over_frames(scores, "psnr") == pytest.approx(over_frames)
    rows = averages(scores, ["psnr"])
    assert [row["which"] for row in rows] == ["all", "input", "synthesised"]
    assert rows[0]["over_frames"]["psnr"] == pytest.approx(over_frames)


def test_the_others_go_on():
    clips = [clip(sample_clip(5, 32, 32), "short"), clip(sample_clip(7, 32, 32), "good")]
    results = dict(evaluate(clips, PROTOCOL, [baseline(PROTOCOL)], METRIC))
    assert isinstance(results["short"], ValueError) and not isinstance(results["good"], ValueError)


def test_sizes_are_cut_to_the_scale():
    truth = sample_clip(7, 35, 38)
    score = score_clip(clip(truth), PROTOCOL, baseline(PROTOCOL), METRIC)
    whole = score_clip(clip(truth[..., :32, :36]), PROTOCOL, baseline(PROTOCOL), METRIC)
    assert score.frames == whole.frames


def test_baselines():
    lq = sample_clip(3, 16, 16)
    deblurring = Protocol(scale=1, time_scale=1, window=3)
    assert baseline(deblurring).name == "unchanged"
    check_methods("deblur", deblurring, [baseline(deblurring)])  # no name of what is saved beside results
    assert torch.equal(bicubic_average(lq, 1, 1), lq)
    assert baseline(Protocol(time_scale=1)).name == "bicubic"
    thirds = bicubic_average(lq, 1, 3)
    assert len(thirds) == 7 and torch.allclose(thirds[1], lq[0] * 2 / 3 + lq[1] / 3, atol=1e-6)
    halves = bicubic_average(lq, 4, 2)
    assert torch.equal(halves[::2], imresize(lq, 4)) and len(halves) == 5


def test_a_network_of_another_scale_is_refused():
    network = ARCHS["stdan"](**COMPACT).eval()
    method = network_method("tiny", network, torch.device("cpu"))
    check_methods("set", PROTOCOL, [method])
    with pytest.raises(ValueError, match=r"tiny restores x4 in space and x2 in time, datasets.set is x4 and x1"):
        check_methods("set", Protocol(time_scale=1), [method])
    with pytest.raises(ValueError, match="two methods have the name tiny"):
        check_methods("set", PROTOCOL, [method, method])


def test_costs_are_of_frames_of_256x448():
    network = ARCHS["stdan"](**COMPACT).eval()
    cost = network_method("tiny", network, torch.device("cpu")).cost()
    assert cost["parameters"] == sum(p.numel() for p in network.parameters()) and cost["gmac"] > 0.01


def write_clips(folder: Path, clips: dict[str, torch.Tensor]) -> Path:
    for name, frames in clips.items():
        with FrameFolderWriter(folder / name) as writer:
            for i, frame in enumerate(frames):
                writer.write(f"{i:08d}", frame)
    return folder


def test_results_of_somebody_else(tmp_path):
    truth = sample_clip(9, 32, 32)
    theirs = write_clips(tmp_path / "theirs", {"clip": (truth * 0.9), "other": truth[:3]})
    method = folder_method("theirs", theirs, {"clip": 9, "other": 9, "third": 9})
    score = score_clip(clip(truth), PROTOCOL, method, METRIC)
    assert len(score.frames) == 9 and 15 < score.mean("psnr") < 40
    for name, message in (("other", "3 frames, but the true clip other has 9"), ("third", "no results for the clip")):
        (_, error), = evaluate([clip(truth, name)], PROTOCOL, [method], METRIC)
        assert message in str(error)
    small = write_clips(tmp_path / "small", {"clip": truth[..., :16, :16]})
    (_, error), = evaluate([clip(truth)], PROTOCOL, [folder_method("small", small, {"clip": 9})], METRIC)
    assert "small gives 7 frames of 16x16, the truth has 7 of 32x32" in str(error)
    assert list(names_of([f"a={theirs}", str(small)])) == ["a", "small"]
    with pytest.raises(ValueError, match="comes twice"):
        names_of([str(small), str(small)])


def test_given_inputs_at_full_and_at_half_rate(tmp_path):
    truth = sample_clip(9, 32, 32)
    gt = write_clips(tmp_path / "gt", {"clip": truth})
    seen = []

    def watch(lq, name, window):
        seen.append(lq)
        return torch.zeros(7, 3, 32, 32)

    marked = truth[..., ::4, ::4] * 0.5
    for folder, frames in (("full", marked), ("half", marked[::2])):
        lq = write_clips(tmp_path / folder, {"clip": frames})
        made = TEST_SETS["folder"](dataroot_gt=str(gt), dataroot_lq=str(lq))
        assert "as given" in made.protocol.text
        score_clip(made.found[0], made.protocol, Method("watch", watch), METRIC)
    assert all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:], strict=True))
    assert torch.allclose(seen[0], marked[:7:2], atol=1 / 255)
    odd = write_clips(tmp_path / "odd", {"clip": marked[:4]})
    with pytest.raises(ValueError, match="4 input frames for 9 true frames"):
        TEST_SETS["folder"](dataroot_gt=str(gt), dataroot_lq=str(odd))


def test_the_degradation_is_part_of_the_protocol():
    text = SampleTest(frames=7, height=32, width=32, degradation={"type": "bd"}).protocol.text
    assert "BlurDown" in text and "phase" in text
    with pytest.raises(ValueError, match="degradation: unknown key 'sigm'"):
        SampleTest(frames=7, height=32, width=32, degradation={"type": "bd", "sigm": 1})


def test_vimeo_lists(tmp_path):
    frames = sample_clip(7, 32, 32)
    for name in ("00001/0001", "00001/0002"):
        with FrameFolderWriter(tmp_path / "sequences" / name) as writer:
            for i, frame in enumerate(frames, start=1):
                writer.write(f"im{i}", frame)
    (tmp_path / "slow_testset.txt").write_text("00001/0001\n00001/0002\n\n")  # a blank line is no clip
    made = TEST_SETS["vimeo90k-slow"](dataroot_gt=str(tmp_path))
    assert len(made) == 2 and "2 clips, the list of none of the known ones" in made.protocol.text
    assert "1,613" in made.protocol.text and "1,616" in made.protocol.text
    score = score_clip(made.found[0], made.protocol, baseline(made.protocol), METRIC)
    assert len(score.frames) == 7


def test_pairs_of_blurred_and_sharp(tmp_path):
    sharp = sample_clip(6, 32, 32)
    write_clips(tmp_path, {"a/sharp": sharp, "a/blur": sharp * 0.5})
    for preset in ("gopro", "dvd"):
        made = TEST_SETS[preset](dataroot_gt=str(tmp_path))
        assert made.protocol.color == "rgb" and made.protocol.scale == made.protocol.time_scale == 1
        metrics = default_metrics(made.protocol)
        assert metrics["psnr"].label == "PSNR-RGB" and "input from blur" in made.protocol.text
        score = score_clip(made.found[0], made.protocol, baseline(made.protocol), metrics)
        assert score.mean("psnr") < 20 and not any(f.synthesised for f in score.frames)
    with pytest.raises(ValueError, match="Sharp/RGB"):
        TEST_SETS["bsd"](dataroot_gt=str(tmp_path))


def test_the_first_frames_only(tmp_path):
    write_clips(tmp_path, {"a": sample_clip(9, 32, 32), "b": sample_clip(7, 32, 32)})
    made = TEST_SETS["folder"](dataroot_gt=str(tmp_path), max_frames=7)
    assert [found.count for found in made.found] == [7, 7] and "the first 7 frames" in made.protocol.text
    scores = [score_clip(found, made.protocol, baseline(made.protocol), METRIC) for found in made.found]
    assert [len(score.frames) for score in scores] == [7, 7]


def test_reds4(tmp_path):
    write_clips(tmp_path / "train_sharp", {name: sample_clip(3, 32, 32) for name in ("000", "001", "011")})
    made = TEST_SETS["reds4"](dataroot_gt=str(tmp_path), clips=("000", "011"))
    assert [found.name for found in made.found] == ["000", "011"] and made.protocol.color == "rgb"


def test_vid4_names_what_is_missing(tmp_path):
    write_clips(tmp_path, {"walk": sample_clip(7, 32, 32)})
    with pytest.raises(ValueError, match="Vid4 needs the folder calendar, city, foliage; there: walk"):
        Vid4(dataroot_gt=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "time_scale", "psnr", "ssim"),
    [("city", 2, 25.00, 0.5877), ("city", 1, 25.16, 0.6028)],
)
def test_the_baseline_on_vid4(name, time_scale, psnr, ssim):
    """23.34 dB / 0.6158 and 23.784 / 0.6347 over Vid4, by an independent implementation; here its shortest clip."""
    folder = SHARED / "data" / "eval" / "Vid4"
    if not folder.is_dir():
        pytest.skip(f"Vid4 is not at {folder}")
    made = Vid4(dataroot_gt=str(folder), clips=(name,), time_scale=time_scale)
    score = score_clip(made.found[0], made.protocol, baseline(made.protocol), METRIC)
    assert score.mean("psnr") == pytest.approx(psnr, abs=0.01)
    assert score.mean("ssim") == pytest.approx(ssim, abs=1e-4)
