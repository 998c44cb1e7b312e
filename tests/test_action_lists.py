"""Lists of labelled clips in their published forms, which frames of a clip are seen, textures that move."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import unchecked
from torch.testing import assert_close

from restore.action_lists import classes_in_folders, kinetics, listed, something_something
from restore.frames import open_clips
from restore.labelled_clips import FrameChoice, Labelled, resized
from restore.moving_textures import moving_textures
from restore.writers import VideoWriter


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def told(found: Labelled) -> list[tuple[str, int, str]]:
    return [(clip.name, clip.label, str(clip.source)) for clip in found.clips]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_folders():
    touch("d/b c/2.mp4", "d/b c/1.webm", "d/a/x/0001.jpg", "d/a/y/frames/1.png", "d/a/.hidden/1.png", "d/a/notes.txt")
    found = classes_in_folders("d")
    assert found.names == ("a", "b c")
    assert [(clip.label, str(clip.source)) for clip in found.clips] == [
        (0, "d/a/x"), (0, "d/a/y/frames"), (1, "d/b c/1.webm"), (1, "d/b c/2.mp4"),
    ]  # fmt: skip


def test_something_something_v2():
    touch("v/78687.webm", "v/42326/00001.jpg")
    Path("labels.json").write_text(json.dumps({"Holding something next to something": "1", "Closing something": "0"}))
    Path("train.json").write_text(json.dumps([
        {"id": "78687", "label": "holding potato next to vicks vaporub bottle",
         "template": "Holding [something] next to [something]", "placeholders": ["potato", "vicks vaporub bottle"]},
        {"id": "42326", "label": "closing a box", "template": "Closing [something]", "placeholders": ["a box"]},
    ]))  # fmt: skip
    found = something_something("v", "train.json", "labels.json")
    assert found.names == ("Closing something", "Holding something next to something")
    assert told(found) == [("78687", 1, "v/78687.webm"), ("42326", 0, "v/42326")]


def test_something_something_v1():
    touch("v/100218/00001.jpg", "v/24413/00001.jpg")
    Path("labels.csv").write_text("Holding something\nTurning something upside down\n")
    Path("train.csv").write_text("100218;Turning something upside down\n24413;Holding something\n")
    found = something_something("v", "train.csv", "labels.csv")
    assert found.names == ("Holding something", "Turning something upside down")
    assert told(found) == [("100218", 1, "v/100218"), ("24413", 0, "v/24413")]


def test_kinetics(caplog):
    touch("k/riding a bike/abc_def_000003_000013.mp4", "k/air_drumming/xyz.mp4", "k/-Q1_000010_000020.mkv")
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    rows = "riding a bike,abc_def,3,13,train,0\nair drumming,xyz,0,10,train,0\nriding a bike,-Q1,10,20,train,0\n"
    Path("train.csv").write_text(head + rows)
    found = kinetics("k", "train.csv")
    assert found.names == ("air drumming", "riding a bike")
    assert [(label, path) for _, label, path in told(found)] == [
        (1, "k/riding a bike/abc_def_000003_000013.mp4"), (0, "k/air_drumming/xyz.mp4"),
        (1, "k/-Q1_000010_000020.mkv"),
    ]  # fmt: skip
    Path("train.csv").write_text(head + rows + "air drumming,gone,0,10,train,0\n")
    with pytest.raises(ValueError, match="1 of 4 clips are not in k: air drumming/gone_000000_000010; skip_missing"):
        kinetics("k", "train.csv")
    assert len(kinetics("k", "train.csv", skip_missing=True).clips) == 3
    assert "1 of 4 clips" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["78687 60 1\na/b 32 0\n", "78687 1\na/b 0\n", "78687,1\na/b,0\n", "78687, 60, 1\n\na/b,32,0\n"],
)  # fmt: skip
def test_lists_of_other_programs(text):
    touch("v/78687.mp4", "v/a/b/1.png")
    Path("list.txt").write_text(text)
    Path("names.txt").write_text("zero\none\n")
    found = listed("v", "list.txt", "names.txt")
    assert told(found) == [("78687", 1, "v/78687.mp4"), ("a/b", 0, "v/a/b")] and found.names == ("zero", "one")
    assert listed("v", "list.txt").names is None


def test_names_with_spaces_and_commas():
    touch("v/riding a bike/x.mp4", "v/sun, moon.mp4")
    Path("list.txt").write_text("riding a bike/x.mp4 4\nsun, moon.mp4,3\n")
    assert [(name, label) for name, label, _ in told(listed("v", "list.txt"))] == [
        ("riding a bike/x.mp4", 4), ("sun, moon.mp4", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: classes_in_folders("nowhere"), "nowhere: no such folder"),
        (lambda: classes_in_folders("none"), "none: no folders in it"),
        (lambda: listed("v", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (lambda: listed("v", "empty.txt"), "empty.txt: lists no clips"),
        (lambda: listed("v", "bad.txt"), "line 2: 'only' is not 'path label'"),
        (lambda: listed("v", "far.txt", "names.txt"), "line 1: label 2, but names.txt has classes 0 .. 1"),
        (lambda: listed("v", "far.txt", "twice.txt"), "the class 'a' comes twice"),
        (lambda: listed("none", "far.txt"), "1 of 1 clips are not in none: x.mp4; dataroot is where"),
        (lambda: something_something("v", "v1.csv", "names.txt"), "line 1: the class 'c' is none of the 2"),
        (lambda: something_something("v", "far.txt", "names.txt"), "line 1: 'x.mp4 2' is not 'id;label'"),
        (lambda: something_something("v", "test.json", "names.txt"), "entry 0: not"),
        (lambda: something_something("v", "broken.json", "names.txt"), "broken.json: not JSON"),
        (lambda: something_something("v", "v1.csv", "test.json"), "numbered from 0 on"),
        (lambda: kinetics("v", "names.txt"), "no column label, youtube_id"),
        (lambda: kinetics("v", "times.csv"), "line 2: the times 'soon', '10' are no numbers"),
    ],
)
def test_bad_lists_are_one_line(read, message):
    touch("v/x.mp4", "none/file.txt", "empty.txt")
    for name, text in {
        "bad.txt": "x.mp4 0\nonly\n", "far.txt": "x.mp4 2\n", "names.txt": "a\nb\n", "twice.txt": "a\na\n",
        "v1.csv": "x;c\n", "test.json": '[{"id": "1"}]', "broken.json": "[",
        "times.csv": "label,youtube_id,time_start,time_end\na,x,soon,10\n",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    with pytest.raises(ValueError) as error:
        read()
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- frames


@pytest.mark.parametrize("count", [1, 3, 8, 100])
@pytest.mark.parametrize("sampling", ["segments", "dense"])
def test_frames_are_in_order_and_of_the_clip(sampling, count):
    choice = FrameChoice(8, sampling, 3)
    drawn = [choice.drawn(count, np.random.default_rng(seed)) for seed in range(20)]
    for numbers in (*drawn, *choice.spread(count, 1), *choice.spread(count, 5)):
        assert len(numbers) == 8 and numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] < count
    if count == 100:
        assert len({tuple(numbers) for numbers in drawn}) > 10


def test_segments_have_a_frame_each():
    choice = FrameChoice(4, "segments", 1)
    for seed in range(20):
        assert [number // 5 for number in choice.drawn(20, np.random.default_rng(seed))] == [0, 1, 2, 3]
    assert choice.spread(20, 1) == [[2, 7, 12, 17]]
    assert choice.spread(20, 2) == [[1, 6, 11, 16], [3, 8, 13, 18]]
    assert choice.spread(4, 1) == [[0, 1, 2, 3]] and choice.spread(2, 1) == [[0, 0, 1, 1]]


def test_dense_frames_are_apart():
    choice = FrameChoice(4, "dense", 2)
    assert all(set(np.diff(choice.drawn(20, np.random.default_rng(seed)))) == {2} for seed in range(20))
    assert choice.spread(20, 1) == [[6, 8, 10, 12]]
    assert choice.spread(20, 3) == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]]
    assert choice.spread(3, 2) == [[0, 2, 2, 2]] * 2


def test_frames_that_are_picked_are_those_that_are_read():
    with VideoWriter("x.mp4", fps=10) as video:
        for i in range(30):
            video.write(torch.full((3, 32, 32), i / 30))
    (clip,) = open_clips("x.mp4")
    assert torch.equal(clip.pick([3, 4, 11, 29]), clip.read(0, 30)[[3, 4, 11, 29]])


def test_resizing_keeps_the_shape():
    frames = torch.rand(2, 3, 40, 60)
    assert resized(frames, 20).shape == (2, 3, 20, 30) and resized(frames.mT, 20).shape == (2, 3, 30, 20)
    assert resized(frames, 40) is frames
    assert_close(resized(torch.full((1, 3, 9, 12), 0.3), 6), torch.full((1, 3, 6, 8), 0.3))


# ---- textures


def textures(**changes) -> Labelled:
    arguments = {"hold": 1, "photos": ["brick", "grass"], "number": 8, "length": 5, "side": 12, "seed": 3, **changes}
    return moving_textures(["left", "right", "up", "down"], [1, 3], **arguments)


def test_what_moves_goes_where_its_class_says():
    found = textures()
    assert found.names == ("left 1", "left 3", "right 1", "right 3", "up 1", "up 3", "down 1", "down 3")
    shifts = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip in found.clips:
        before, after = clip.open().truth([1, 2])
        direction, speed = found.names[clip.label].split()
        rows, columns = (int(speed) * part for part in shifts[direction])
        moved = torch.roll(before, (rows, columns), (1, 2))[:, 3:-3, 3:-3]
        assert torch.equal(moved, after[:, 3:-3, 3:-3]) and not torch.equal(before, after)


def test_frames_are_held():
    clip = textures(hold=4, length=8).clips[0].open()
    frames = clip.truth(range(8))
    assert all(torch.equal(frames[0], frame) for frame in frames[:4])
    assert not torch.equal(frames[3], frames[4]) and torch.equal(frames[4], frames[7])


def test_a_reversed_clip_is_one_of_the_opposite_direction():
    left, right = (textures(length=3).clips[i].open() for i in (0, 2))
    (a, b, _), backwards = left.truth(range(3)), right.truth(range(3))[::-1]
    for first, second in ((a, b), (backwards[0], backwards[1])):
        assert torch.equal(first[:, :, 1:], second[:, :, :-1])


def test_single_frames_do_not_know_their_class():
    """Look and beginning come of the clip's number, not of its class."""
    for number in range(8):
        places = [moving_textures([way], [speed], hold=1, photos=["brick"], number=8, length=2, side=12, seed=3)
                  for way in ("left", "down") for speed in (1, 3)]  # fmt: skip
        first, *others = [found.clips[number].open().truth([0])[0] for found in places]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"photos": ["moon"]}, "photos=\\['moon'\\]: give some of"), ({"number": 0}, "must be at least 1")],
)
def test_bad_textures(changes, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        textures(**changes)
