"""Windows in time and tiles in space: laws that hold for any size, window, tile and overlap."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from archs import STDAN, VideoNet
from restore.device import PRECISIONS, resolve_precision
from restore.stream import (
    _feathers,
    _windows,
    pad_to,
    restore_clip,
    restore_window,
    spans,
)


class Pointwise(VideoNet):
    """Every pixel by itself: the same result for any window and tile."""

    scale, multiple_of = 2, 4

    def forward(self, clip: Tensor) -> Tensor:
        self.check_clip(clip)
        return (clip * 0.5 + 0.25).repeat_interleave(2, -1).repeat_interleave(2, -2)


class Double(VideoNet):
    """Twice as many frames, each in between the mean of its neighbours."""

    time_scale, min_frames = 2, 2

    def forward(self, clip: Tensor) -> Tensor:
        self.check_clip(clip)
        between = (clip[:, :-1] + clip[:, 1:]) / 2
        both = torch.stack((clip[:, :-1], between), 2).flatten(1, 2)
        return torch.cat((both, clip[:, -1:]), 1)


class CallNumber(VideoNet):
    """Frames full of the number of the call, in hundredths: tells which window a result is from."""

    def __init__(self, time_scale: int = 1) -> None:
        super().__init__()
        self.time_scale, self.calls = time_scale, 0

    def forward(self, clip: Tensor) -> Tensor:
        self.calls += 1
        return clip.new_full((1, self.frames_out(clip.shape[1]), *clip.shape[2:]), self.calls / 100)


def noise(frames: int, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames + height + width))


def numbers(frames: Iterator[Tensor]) -> list[float]:
    return [round(100 * float(frame.mean()), 3) for frame in frames]


@pytest.mark.parametrize(("length", "size", "overlap"), [(1, 4, 1), (4, 4, 3), (5, 4, 1), (40, 7, 0), (41, 7, 6)])
def test_spans_cover_everything_and_overlap(length, size, overlap):
    pieces = spans(length, size, overlap)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    assert all(stop - start == min(size, length) for start, stop in pieces)
    assert all(a[1] - b[0] == overlap for a, b in pairwise(pieces[:-1]))
    assert all(a[1] - b[0] >= overlap and b[0] > a[0] for a, b in pairwise(pieces))


def test_windows_lie_where_spans_lie():
    for length in range(1, 20):
        for size, overlap in ((1, 0), (4, 0), (4, 1), (5, 3), (7, 6)):
            windows = [(start, start + len(clip)) for start, clip in _windows(noise(length), size, overlap, 1)]
            assert windows == spans(length, size, overlap), (length, size, overlap)


def test_feathers_sum_to_one():
    for length in (1, 3, 4, 5, 9, 22, 37):
        for size, overlap, scale in ((4, 0, 1), (8, 3, 2), (8, 7, 1), (9, 5, 4)):
            parts = spans(length, size, overlap)
            total = torch.zeros(length * scale)
            for (start, stop), weight in zip(parts, _feathers(parts, overlap, scale), strict=True):
                assert weight.min() > 0
                total[start * scale : stop * scale] += weight
            assert_close(total, torch.ones(length * scale))


@pytest.mark.parametrize("size", [(8, 8), (17, 30), (5, 23), (1, 1)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 3), (9, 11), (16, 15)])
def test_tiling_a_pointwise_network_changes_nothing(size, tile, overlap):
    clip = noise(2, *size)
    whole = restore_window(Pointwise(), clip)
    assert whole.shape == (2, 3, 2 * size[0], 2 * size[1])
    assert_close(whole, Pointwise()(clip.repeat_interleave(4, -1).repeat_interleave(4, -2)[None])[0, ..., ::4, ::4])
    assert_close(restore_window(Pointwise(), clip, tile=tile, tile_overlap=overlap), whole)


def test_a_tile_as_large_as_the_frame_is_no_tiling():
    clip = noise(3, 9, 14)
    for tile in (13, 16, 100):
        assert torch.equal(
            restore_window(Pointwise(), clip, tile=tile, tile_overlap=8), restore_window(Pointwise(), clip)
        )


@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("size", [(8, 16), (9, 15), (1, 3), (2, 30)])
def test_padding_and_its_undoing(size, mode):
    clip = noise(2, *size)
    padded, crop = pad_to(clip, 8, mode)
    height, width = padded.shape[-2:]
    assert height % 8 == width % 8 == 0
    assert height - size[0] < 8 > width - size[1]
    assert torch.equal(crop(padded, 1), clip)
    assert crop(padded.repeat_interleave(4, -1), 4).shape[-1] == 4 * size[1]
    if mode == "zero":
        assert padded.sum() == clip.sum()
    elif size == (9, 15):
        assert torch.equal(padded[..., :9, 15], clip[..., 13])
    elif size == (1, 3):
        assert torch.equal(padded, padded[..., :1, :].expand(2, 3, 8, 8))
        assert torch.equal(padded[..., 0, 3:], clip[..., 0, 2:].expand(2, 3, 5))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9, 16])
def test_windows_change_nothing_for_a_network_that_looks_at_neighbours(length):
    clip = noise(length)
    whole = Double()(clip[None])[0]
    for window, overlap in ((2, 1), (4, 1), (4, 3), (5, 2), (7, 4), (30, 1)):
        frames = list(restore_clip(Double(), iter(clip), window=window, temporal_overlap=overlap))
        assert len(frames) == 2 * length - 1
        assert_close(torch.stack(frames), whole)
        inputs = list(restore_clip(Double(), iter(clip), window=window, temporal_overlap=overlap, slowmo=1))
        assert torch.equal(torch.stack(inputs), clip)


def test_frames_without_overlap():
    clip = noise(7)
    assert torch.equal(
        torch.stack(list(restore_clip(Pointwise(), clip, window=3, temporal_overlap=0, tile=4, tile_overlap=0))),
        restore_window(Pointwise(), clip),
    )


def test_the_first_result_of_one_shared_frame_stays():
    frames = numbers(restore_clip(CallNumber(2), noise(8), window=4, temporal_overlap=1))
    assert frames == [1.0] * 7 + [2.0] * 6 + [3.0] * 2  # the last window begins at input 4
    assert numbers(restore_clip(CallNumber(), noise(8), window=4, temporal_overlap=0)) == [1.0] * 4 + [2.0] * 4


def test_several_shared_frames_are_cross_faded():
    frames = numbers(restore_clip(CallNumber(), noise(6), window=4, temporal_overlap=2))
    assert frames == [1, 1, 1.333, 1.667, 2, 2]
    frames = numbers(restore_clip(CallNumber(2), noise(7), window=4, temporal_overlap=2))
    assert frames == [1, 1, 1, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3]
    frames = numbers(restore_clip(CallNumber(), noise(7), window=4, temporal_overlap=2))
    assert frames == [1, 1, 1.333, 1.667, 2.333, 2.667, 3]


def test_results_are_plain_tensors_in_range():
    class Wild(VideoNet):
        def forward(self, clip: Tensor) -> Tensor:
            return clip * 4 - 1.5

    frames = list(restore_clip(Wild(), noise(5)))
    assert all(frame.dtype == torch.float32 and not frame.is_inference() for frame in frames)
    assert min(frame.min() for frame in frames) == 0
    assert max(frame.max() for frame in frames) == 1
    assert restore_window(Wild(), noise(5)).max() > 1


@pytest.mark.parametrize(("window", "overlap"), [(2, 1), (4, 1), (6, 4)])
def test_frames_are_taken_as_they_are_needed(window, overlap):
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield torch.zeros(3, 4, 4)

    for given, _ in enumerate(restore_clip(Double(), endless(), window=window, temporal_overlap=overlap), start=1):
        assert taken - given // 2 <= window
    assert taken == 1000
    assert given == 1999


def test_nothing_is_taken_before_the_first_frame_is_asked_for():
    frames = iter(noise(4))
    restore_clip(Double(), frames)
    assert len(list(frames)) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temporal_overlap": 0}, "temporal_overlap=0 .* 1 to 3"),
        ({"temporal_overlap": 4}, "temporal_overlap=4 .* 1 to 3"),
        ({"window": 1}, "window=1.*at least 2"),
        ({"slowmo": 3}, "slowmo=3.*1 or 2"),
        ({"tile": 0}, "tile=0"),
        ({"tile": 8, "tile_overlap": 8}, "tile_overlap=8 .* 0 to 7"),
        ({"padding": "wrap"}, "padding='wrap'.*reflect, zero"),
        ({"precision": "fp8"}, "precision='fp8'.*fp32, bf16, fp16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(arguments, says):
    with pytest.raises(ValueError, match=says):
        restore_clip(Double(), noise(4), **arguments)


def test_clips_that_are_too_short():
    with pytest.raises(ValueError, match=r"^1 frame, but the network needs at least 2"):
        list(restore_clip(Double(), noise(1)))
    with pytest.raises(ValueError, match="0 frames"):
        list(restore_clip(Pointwise(), []))
    assert len(list(restore_clip(Pointwise(), noise(1)))) == 1
    with pytest.raises(ValueError, match="pieces of 4 cannot share 4"):
        spans(9, 4, 4)
    with pytest.raises(ValueError, match="padding='edge'"):
        pad_to(noise(1), 8, "edge")


class Exhausted(Pointwise):
    """Has no memory for tiles of more than so many pixels."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error, self.sides = most, error, []

    def forward(self, clip: Tensor) -> Tensor:
        self.sides.append(max(clip.shape[-2:]))
        if self.sides[-1] > self.most:
            raise self.error
        return super().forward(clip)


NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_out_of_memory_halves_the_tiles_and_goes_on(error, caplog):
    clip, net = noise(9, 90, 61), Exhausted(40, error)
    frames = list(restore_clip(net, clip, window=3, temporal_overlap=0, tile_overlap=8))
    assert_close(torch.stack(frames), restore_window(Pointwise(), clip))
    assert net.sides[:3] == [92, 48, 32]  # from whole frames on, and no further back for the windows after
    assert set(net.sides[3:]) == {32}
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with tiles of 92 pixels, 3 frames at once: going on with 48",
        "out of memory with tiles of 48 pixels, 3 frames at once: going on with 32",
    ]


def test_out_of_memory_with_the_smallest_tiles():
    clip = noise(3, 60, 70)
    with pytest.raises(MemoryError, match="even with tiles of 32 pixels, 3 frames at once") as caught:
        list(restore_clip(Exhausted(31, NO_MEMORY["cuda"]), clip, window=3, tile=50))
    assert caught.value.__cause__ is NO_MEMORY["cuda"]
    with pytest.raises(MemoryError, match="tiles of 48 pixels"):  # of which at most half is shared
        list(restore_clip(Exhausted(40, NO_MEMORY["cpu"]), clip, window=3, tile_overlap=24))
    with pytest.raises(MemoryError, match="tiles of 8 pixels"):
        list(restore_clip(Exhausted(4, NO_MEMORY["cpu"]), noise(3)))
    with pytest.raises(RuntimeError, match="shapes"):
        list(restore_clip(Exhausted(4, RuntimeError("shapes")), clip))


def test_one_window_of_results_is_held_at_a_time():
    """While a window is restored, nothing that was given before is in memory."""
    given: list[StorageWeakRef] = []

    class Watched(CallNumber):
        def forward(self, clip: Tensor) -> Tensor:
            assert all(storage.expired() for storage in given)
            return super().forward(clip)

    for overlap in (0, 1, 3):
        frames = restore_clip(Watched(), noise(20), window=5, temporal_overlap=overlap)
        for frame in frames:
            given.append(StorageWeakRef(frame.untyped_storage()))
            del frame
    assert len(given) == 60


def test_precision():
    assert resolve_precision("auto", "cpu") in ("fp32", "bf16")
    assert resolve_precision("auto", "mps") == "fp32"
    assert [resolve_precision(name, "cuda") for name in PRECISIONS] == list(PRECISIONS)
    with pytest.raises(ValueError, match="auto, fp32"):
        resolve_precision("half", "cpu")


def test_stdan_at_an_odd_size():
    torch.manual_seed(0)
    net = STDAN(
        channels=16, embed_dim=16, heads=2, encoder_depths=(1,), decoder_depths=(1,), levels=1, deform_groups=2,
        skip="bicubic", motion_prior="correlation",
    ).eval()  # fmt: skip
    with torch.no_grad():  # a fresh network may do nothing but enlarge
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    clip = noise(3, 21, 18)
    whole = torch.stack(list(restore_clip(net, clip, window=3)))
    assert whole.shape == (5, 3, 84, 72)
    tiled = torch.stack(list(restore_clip(net, clip, window=3, tile=16, tile_overlap=8)))
    # Only at input times: matching blocks of noise, untrained, finds other motion in other tiles.
    assert (tiled - whole)[::2].abs().mean() < 0.01
    half = torch.stack(list(restore_clip(net, clip, window=3, precision="bf16")))
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.01
    zero = torch.stack(list(restore_clip(net, clip, window=3, padding="zero", device="cpu")))
    assert (zero - whole).abs().max() > 0
