"""Pictures of what a network sees: the numbers in them obey laws, looking changes nothing, every part has its own."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_restore_cli import film, folder, names, tree
from tiny import COMPACT, DEBLUR, FREQUENCY, FUSION, HALF, JOINT, PUBLISHED, RECURRENT, awaken, seeded_clip
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import restore.__main__ as cli
from archs import ARCHS, VideoNet
from archs.layers.energy_attention import FusedTarget
from restore.checkpoint import save_network
from restore.explain import explain
from restore.explain_drawing import bar_chart, flow_colours, full_length, heat, spectrum_picture, wheel
from restore.explain_pictures import pictures
from restore.explain_watch import Seen, radial_energies, watching
from restore.frames import open_clips, read_image
from restore.sheets import captioned, fitted, side_by_side

INPUT = ["energies_input", "sharpness"]
ATTENTION = [*INPUT, "energies_features", "offsets_aggregation", "offsets_alignment", "weights"]
NETWORKS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "published": ("stdan", PUBLISHED, ATTENTION),
    "compact": ("stdan", COMPACT, [*ATTENTION, "motion_matching"]),
    "recurrent": ("stdan", RECURRENT, [*INPUT, "motion_matching"]),
    "frequency": ("stdan_freq", FREQUENCY, [*ATTENTION, "motion_phase", "weights_bands"]),
    "compact frequency": (
        "stdan_freq", {**COMPACT, **FUSION, "channel": False},
        [*ATTENTION, "motion_matching", "motion_phase", "weights_bands"],
    ),
    "no bands": ("stdan_freq", {**PUBLISHED, "bands": None, "guide": False}, [*ATTENTION, "motion_phase"]),
}  # fmt: skip
DEBLURRING: dict[str, tuple[str, dict[str, Any]]] = {  # frames of the input's size, a grid of 1/4 or 1/2 of it
    "between": ("stdan", JOINT),
    "frequency": ("stdan_freq", {**DEBLUR, "motion_prior": "correlation"}),
    "half grid": ("stdan_freq", {**HALF, "motion_prior": "correlation"}),
}
FIVE = ["04", "04_5", "05", "05_5", "06"]


def network(case: str) -> VideoNet:
    torch.manual_seed(0)
    kind, arguments, _ = NETWORKS[case]
    net = ARCHS[kind](**arguments).eval()
    awaken(net)
    return net


def fresh(kind: str, **arguments: Any) -> VideoNet:
    torch.manual_seed(0)
    return ARCHS[kind](**arguments).eval()


def watched(net: VideoNet, clip: Tensor) -> Seen:
    with watching(net) as seen, torch.inference_mode():
        net(clip)
    return seen


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth noise that fits together at opposite edges, (3, h, w) in 0..1."""
    spectrum = torch.fft.rfft2(seeded_clip(3, height, width, seed=seed))
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    x = torch.fft.irfft2(spectrum * torch.exp(-20 * (fy**2 + fx**2)), (height, width))
    return (x - x.min()) / (x.max() - x.min())


def translated(count: int, step: tuple[int, int], height: int = 48, width: int = 64) -> Tensor:
    frame = texture(height, width)
    return torch.stack([frame.roll((n * step[0], n * step[1]), (1, 2)) for n in range(count)])[None]


@pytest.mark.parametrize("case", NETWORKS)
def test_every_part_has_its_picture(case, tmp_path):
    seen = watched(network(case), seeded_clip(1, 3, 3, 16, 24))
    line = explain(seen, FIVE, tmp_path / "seen", title="a <clip>", size=(13, 18))
    expected = sorted(NETWORKS[case][2])
    assert names(tmp_path / "seen") == sorted(["index.html", *(f"{name}.png" for name in expected)])
    assert line.startswith(f"{len(expected)} pictures of the first 5 frames in {tmp_path / 'seen'}")
    page = (tmp_path / "seen" / "index.html").read_text()
    assert sorted(re.findall(r'src="(\w+)\.png"', page)) == expected
    assert "a &lt;clip&gt;" in page and "3 input frames, 18x13 px" in page and "04, 04_5, 05, 05_5, 06" in page
    for name, width, height in re.findall(r'src="(\w+)\.png".*width="(\d+)" height="(\d+)"', page):
        picture = read_image(tmp_path / "seen" / f"{name}.png")
        assert picture.shape == (3, int(height), int(width)) and int(width) >= 720
        assert picture.std() > 0.02
    assert ("mean weight on interpolated frames" in line) == ("weights" in expected)


@pytest.mark.parametrize("case", NETWORKS)
def test_looking_changes_nothing_and_leaves_nothing(case):
    net, clip = network(case), seeded_clip(1, 3, 3, 16, 24)

    def state() -> list[tuple]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "_fuse" in vars(m)) for m in net.modules()]
        return [*hooks, *(m.observe for m in net.modules() if hasattr(m, "observe"))]

    before = state()
    with torch.inference_mode():
        expected = net(clip)
        with watching(net) as seen:
            assert state() != before
            assert torch.equal(net(clip), expected)
            assert state() == before, "after the first call nobody looks"
            first = seen.clip
            net(clip + 1)
            assert seen.clip is first
    assert state() == before
    with watching(net) as unused:
        pass
    assert state() == before and unused.clip is None
    with suppress(ValueError), watching(net):
        net(clip[:, :1])
    assert state() == before


def test_an_observer_stays_and_still_observes():
    net, others = network("frequency"), []
    net.aggregate.fusion.observe = others.append
    seen = watched(net, seeded_clip(1, 2, 3, 16, 24))
    assert [x.target for x in others] == [x.target for x in seen.fused] == [0, 1, 2]
    assert net.aggregate.fusion.observe == others.append


def test_of_a_batch_the_first_clip_is_watched():
    for case in NETWORKS:
        net, clips = network(case), seeded_clip(2, 3, 3, 16, 24)
        alone, together = watched(net, clips[:1]), watched(net, clips)
        for name in ("clip", "restored", "matched", "shifts", "confidence", "feature_energies"):
            assert_close(getattr(together, name), getattr(alone, name), msg=lambda m, name=name: f"{name}: {m}")
        assert_close(together.aligned, alone.aligned)
        assert_close(together.read, alone.read)
        assert_close([x.frame for x in together.fused], [x.frame for x in alone.fused])


@pytest.mark.parametrize("step", [(2, -3), (0, 4)])
def test_phase_correlation_sees_a_translation(step):
    # convolutions move with their input, windows of attention do not
    net = fresh("stdan_freq", **{**FREQUENCY, "trunk": "residual", "enhance": None, "dct_condition": False})
    seen = watched(net, translated(3, step))
    assert seen.shifts.shape == (2, 2, 48, 64) and seen.confidence.shape == (2, 1, 48, 64)
    inside = seen.shifts[..., 12:-12, 12:-12]
    assert_close(inside.mean((0, 2, 3)), torch.tensor(step).float(), atol=0.15, rtol=0)
    assert float(inside.std((0, 2, 3)).max()) < 0.3
    assert float(seen.confidence.mean()) > 0.5
    full, _ = full_length([inside])
    colour = flow_colours(inside[0], full).mean((1, 2))
    assert_close(colour, flow_colours(torch.tensor(step).float()[:, None, None], full)[:, 0, 0], atol=0.05, rtol=0)


def test_block_matching_sees_a_translation_and_alignment_starts_there():
    seen = watched(fresh("stdan", **COMPACT), translated(3, (2, -4)))
    inside = (..., slice(12, -12), slice(12, -12))
    assert_close(seen.matched[inside].mean((0, 2, 3)), torch.tensor([2.0, -4.0]), atol=0.3, rtol=0)
    # fresh offsets are zero: what is read is where the flows lead, half-way each
    assert_close(seen.aligned["later"] - seen.aligned["earlier"], seen.matched)
    for target, read in zip(seen.fused, seen.read, strict=True):
        for i, vectors in zip(target.sources, read, strict=True):
            lead = (i - target.target) * torch.tensor([1.0, -2.0])
            assert_close(vectors[inside].mean((1, 2)), lead, atol=0.3, rtol=0)


@pytest.mark.parametrize("case", DEBLURRING)
def test_of_a_coarser_grid_maps_and_vectors_are_in_input_pixels(case, tmp_path):
    """What moves by 2 px on the grid of a network that keeps the size moves by 8 in its input."""
    kind, arguments = DEBLURRING[case]
    seen = watched(fresh(kind, **arguments), translated(3, (2, -4)).repeat_interleave(4, -1).repeat_interleave(4, -2))
    maps = [seen.matched, *seen.read, *seen.aligned.values(), *(x.frame for x in seen.fused)]
    assert seen.fused and all(x.shape[-2:] == (192, 256) for x in maps)
    inside = (..., slice(48, -48), slice(48, -48))
    assert_close(seen.matched[inside].mean((0, 2, 3)), torch.tensor([8.0, -16.0]), atol=1.2, rtol=0)
    names = [str(n) for n in range(len(seen.restored))]
    line = explain(seen, names, tmp_path, title="x", size=(190, 250))
    assert line.startswith(f"{len(pictures(seen, names))} pictures")


def test_without_motion_and_training_everything_is_read_in_place():
    seen = watched(fresh("stdan", **PUBLISHED), seeded_clip(1, 3, 3, 16, 24))
    assert seen.matched is None and seen.shifts is None
    assert len(seen.read) == 5 and all(not x.any() for x in (*seen.read, *seen.aligned.values()))


@pytest.mark.parametrize("case", ["published", "compact", "frequency", "no bands"])
def test_weights_of_the_sources_sum_to_one(case):
    seen = watched(network(case), seeded_clip(1, 3, 3, 16, 24))
    radius = NETWORKS[case][1].get("temporal_radius") or 9
    for j, target in enumerate(seen.fused):
        assert target.target == j
        assert target.sources == tuple(i for i in range(5) if i != j and abs(i - j) <= radius)
        assert_close(target.frame.sum(1), torch.ones(1, 16, 24))
        assert target.frame.min() >= 0 and target.frame.max() <= 1
        if target.band is not None:
            assert_close(target.band.sum(1), torch.ones(1, 16, 13))


def test_plain_weights_are_those_of_the_fusion():
    """A fresh energy fusion weighs sources as no fusion does."""
    clip = seeded_clip(1, 2, 3, 16, 24)
    plain, fused = fresh("stdan", **PUBLISHED), fresh("stdan_freq", **PUBLISHED)
    fused.load_state_dict(plain.state_dict(), strict=False)
    for a, b in zip(watched(plain, clip).fused, watched(fused, clip).fused, strict=True):
        assert_close(a.frame, b.frame)


def test_weight_on_interpolated_frames_in_words():
    clip = torch.zeros(2, 3, 4, 4)

    def leaning(*targets: tuple[tuple[int, ...], list[float]]) -> str | None:
        fused = [
            FusedTarget(n, sources, torch.tensor(weights)[None, :, None, None].expand(1, -1, 4, 4), None, None)
            for n, (sources, weights) in enumerate(targets)
        ]
        return Seen(clip=clip, restored=torch.zeros(3, 3, 4, 4), fused=fused).leaning()

    assert leaning() is None
    assert leaning(((1, 2), [0.2, 0.8]), ((0, 1, 2), [0.5, 0.4, 0.1])) == (
        "mean weight on interpolated frames 0.300, where equal weights would give 0.417"
    )
    assert "0.500, given by which frames are sources" in str(leaning(((1,), [1.0]), ((0, 2), [0.5, 0.5])))


def test_energies_of_noise_and_blur():
    noise = 0.5 * torch.randn(64, 96, 96, generator=torch.Generator().manual_seed(0))
    energies = radial_energies(noise + 0.7)
    assert energies.shape == (64, 8)
    assert_close(energies.mean(0)[1:], torch.full((7,), 0.25), atol=0.02, rtol=0)
    blurred = radial_energies(F.avg_pool2d(noise[:, None], 3, 1, 1))[:, 0]
    fall = (blurred / energies).mean(0)
    assert (fall.diff()[:4] < 0).all() and fall[-1] < 0.1


def test_the_wheel_is_its_own_legend():
    legend = wheel(73)
    right, down, left = legend[:, 36, 71], legend[:, 71, 36], legend[:, 36, 1]
    assert right[0] > 0.99 and right[1:].max() < 0.05  # red
    assert_close(right + left, torch.ones(3), atol=0.05, rtol=0)  # opposite directions: complementary colours
    assert_close(down, flow_colours(torch.tensor([5.0, 0.0])[:, None, None], 5.0)[:, 0, 0], atol=0.05, rtol=0)
    assert_close(legend[:, 36, 36], torch.ones(3), atol=0.05, rtol=0)  # no motion is white
    assert (legend[:, 0, 0] < 0.1).all()  # nothing beyond the disc


def test_lengths_of_the_legend():
    field = torch.zeros(1, 2, 100, 100)
    assert full_length([field]) == (0.1, 0.0)
    field[:, 1], field[0, 0, 0, 0] = 3, 4
    assert full_length([field]) == (3.0, 5.0)


def test_maps_run_from_dark_to_bright():
    ramp = heat(torch.linspace(-1, 3, 50)[None], 0, 2).sum(0)[0]
    assert (ramp.diff()[:12] == 0).all() and (ramp.diff()[-12:] == 0).all() and ramp[13:37].diff().min() > -0.02
    assert ramp[-1] > 2 * ramp[0]


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (8, 13)])
def test_the_plane_of_frequencies(size):
    x = seeded_clip(*size)
    assert_close(spectrum_picture(torch.fft.rfft2(x).abs(), size[1]), torch.fft.fftshift(torch.fft.fft2(x).abs()))


def test_bars_are_as_high_as_their_shares():
    picture = bar_chart([0.5, 0.25], [(255, 0, 0), (255, 0, 0)], 0.5, 100, 126)
    red = ((picture[0] > 0.99) & (picture[1] < 0.01)).sum(0)
    assert red[12] == pytest.approx(2 * red[60], abs=3) and red[12] == pytest.approx(100, abs=2)


def test_sheets():
    frame = seeded_clip(3, 10, 60)
    assert torch.equal(fitted(frame, 130), frame.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert_close(fitted(frame, 30), F.avg_pool2d(frame, 2))
    row = side_by_side({"one": frame, "two": frame})
    assert row.shape == (3, 34, 120)
    assert_close(row[:, 24:, :58], frame[:, :, :58], atol=0.6 / 255, rtol=0)
    # of a name that is too long the end is shown, where frames differ
    long = captioned(frame, "a_very_long_name_0001")
    assert torch.equal(long, captioned(frame, "another_long_name_0001"))
    assert not torch.equal(long, captioned(frame, "a_very_long_name_0002"))


def test_pictures_of_odd_sizes_and_many_frames():
    seen = watched(network("frequency"), seeded_clip(1, 5, 3, 16, 40)).cropped(11, 37)
    made = pictures(seen, [f"{n:030d}" for n in range(9)])
    assert all(p.sheet.min() >= 0 and p.sheet.max() <= 1 and p.sheet.shape[2] <= 1700 for p in made)


# ---- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_network(path, network("compact frequency"), {"type": "stdan_freq", **NETWORKS["compact frequency"][1]})
    return str(path)


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capsys):
    """Run the command in `tmp_path`: (exit status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, list[str]]:
        code = cli.main(["-m", weights, "--device", "cpu", "--fp32", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return command


def page(path: Path) -> str:
    return (path / "index.html").read_text()


def test_the_result_is_the_same_to_the_byte(run, tmp_path):
    source = folder(tmp_path / "in", 5)
    assert run(source, "-o", "plain", "--window", 3)[0] == 0
    code, out, err = run(source, "-o", "out", "--window", 3, "--explain", "seen")
    assert (code, err) == (0, [])
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    first, second = out.splitlines()
    assert first.startswith("in: 9 frames 72x48 -> out, ")
    assert second.startswith("in: 9 pictures of the first 5 frames in seen; mean weight on interpolated frames 0.")
    assert "3 input frames, 18x12 px, of which it made 5: 00000004, 00000004_5, " in page(tmp_path / "seen")
    assert run(source, "-o", "more", "--explain", "seen")[0] == 2
    assert run(source, "-o", "out", "--slowmo", 1, "--explain", "seen", "--overwrite")[0] == 0
    assert "made 7: 00000004, 00000004_5, 00000005, " in page(tmp_path / "seen")


def test_clips_videos_and_tiles(run, tmp_path):
    folder(tmp_path / "clips/a", height=24)
    film(tmp_path / "clips/b.mkv", 3)
    code, _, err = run("clips", "-o", "out", "--explain", "seen", "-t", 16, "--tile-overlap", 4, "--start", 1)
    assert (code, err) == (0, [])
    assert names(tmp_path / "seen") == ["a", "b"] and names(tmp_path / "out") == ["a", "b"]
    assert "2 input frames, the top left tile of 16x16 px, of which it made 3" in page(tmp_path / "seen/a")
    assert "made 3: 00000002, 00000003, 00000004" in page(tmp_path / "seen/b")
    code, _, err = run("clips/b.mkv", "-o", "b.mkv", "--codec", "ffv1", "--slowmo", 1, "--explain", "one")
    assert (code, err) == (0, [])
    assert "3 input frames, 18x12 px, of which it made 5: 00000000, 00000000_5, 00000001, " in page(tmp_path / "one")
    assert len(list(open_clips(tmp_path / "b.mkv")[0])) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "out", "--explain", "note.txt"], "note.txt: is a file, but pictures need a folder"),
        (["-o", "out", "--explain", "note.txt/a"], "note.txt/a: cannot be written"),
        (["-o", "out", "--explain", "taken"], "taken: exists and is not empty: .*--overwrite"),
        (["-o", "out", "--explain", "in", "--overwrite"], "in: is the input"),
        (["-o", "out", "--explain", "in/seen"], "in/seen: is inside the input"),
        (["-o", "out", "--explain", "out"], "out: is the output or inside of it"),
        (["-o", "out", "--explain", "out/seen"], "out/seen: is the output or inside of it"),
        (["-o", "out.mp4", "--explain", "out.mp4"], "out.mp4: is the output or inside of it"),
        (["-o", "out", "--explain"], "--explain"),
    ],
)
def test_a_bad_place_is_one_line_and_leaves_nothing(run, tmp_path, arguments, says):
    folder(tmp_path / "in")
    folder(tmp_path / "taken", 1)
    (tmp_path / "note.txt").write_text("x")
    before = tree(tmp_path)
    code, out, err = run("in", *arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("restore: error: ") and re.search(says, err[0]), err[0]
    assert tree(tmp_path) == before


def test_a_dry_run_writes_no_pictures(run, tmp_path):
    folder(tmp_path / "in")
    code, out, _ = run("in", "-o", "out", "--explain", "seen", "--dry-run")
    assert code == 0 and "explain  the first window of each clip, in seen\n" in out
    assert names(tmp_path) == ["in"]


def test_failures_before_and_while_writing(run, tmp_path, monkeypatch):
    folder(tmp_path / "single", 1)
    code, _, err = run("single", "-o", "out", "--explain", "seen")
    assert (code, len(err)) == (2, 1) and names(tmp_path) == ["single"]
    source = folder(tmp_path / "in")

    def full_disk(*_: object, **__: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(cli, "explain", full_disk)
    code, _, err = run(source, "-o", "v.mp4", "--explain", "seen")
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("No space left on device; v.mp4 is complete")
    assert names(tmp_path) == ["in", "single", "v.mp4"]
