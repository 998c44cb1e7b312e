"""A budget of memory: sizes in words, what is measured, and the cut that fits."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from archs import VideoNet
from restore.budget import Cut, MemoryModel, as_size, fit, frames_bytes, parse_bytes, writing_bytes
from restore.stream import least_tile, restore_clip

MB = 1 << 20


class Fourfold(VideoNet):
    """Something that has parameters and keeps to the contract."""

    scale, time_scale, multiple_of, min_frames = 4, 2, 8, 2

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        self.check_clip(clip)
        between = torch.lerp(clip[:, :-1], clip[:, 1:], 0.5)
        both = torch.cat([torch.stack([clip[:, :-1], between], 2).flatten(1, 2), clip[:, -1:]], 1)
        return both.repeat_interleave(4, -1).repeat_interleave(4, -2) * self.gain


class Known(MemoryModel):
    """Takes 100 MB by itself and, of each frame, 1 MB and 10,000 bytes a pixel; tells what was measured."""

    def __init__(self, slope: float = 1e4) -> None:
        self.slope, self.tried = slope, []
        super().__init__(Fourfold())
        self.before = 100 * MB

    def _measure(self, frames: int, side: int) -> int:
        self.tried.append((frames, side))
        return round(frames * (MB + self.slope * side**2))


@pytest.mark.parametrize(
    ("text", "count"),
    [("4G", 4 << 30), ("800M", 800 * MB), ("2000000000", 2_000_000_000), ("1.5 GiB", 3 << 29), ("512kb", 1 << 19)],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count
    assert count <= parse_bytes(as_size(count)) <= count + (11 * MB)


@pytest.mark.parametrize("text", ["", "G", "-4G", "4X", "4 G B", "0", "0M", "0.1", "four", "1e9", "nan", "4GG"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) + ".*such as 4G"):
        parse_bytes(text)


def test_the_network_is_affine_in_the_pixels_beyond_what_is_measured():
    model = Known()
    for frames, pixels in ((4, 32 * 32), (4, 128 * 128), (4, 10**6), (2, 48 * 64), (3, 123_456)):
        assert model.network(frames, pixels) == pytest.approx(frames * (MB + 1e4 * pixels))
    assert set(model.tried) == {(frames, side) for frames in (2, 3, 4) for side in (32, 64, 128)} - {(2, 128)}
    assert model.network(4, 100) == model.network(4, 32 * 32)  # no less than the smallest


def test_no_tile_is_measured_that_may_not_fit():
    model = Known()
    assert model.network(2, 10**6, room=50 * MB) >= 2e4 * 10**6
    assert model.tried[1:] == [(2, 32)]  # four times its 21 MB might be too much
    assert model.network(4, 32 * 32, room=50 * MB) == math.inf
    assert len(model.tried) == 2
    model.network(2, 10**6, room=100 * MB)
    assert model.tried[2:] == [(2, 64)]


def test_real_memory_is_measured():
    model = MemoryModel(Fourfold())
    assert model.before > 50 * MB
    used = model.network(4, 512 * 512)
    clip = torch.rand(4, 3, 512, 512)
    results = 7 * 3 * 4 * 2048**2
    assert results < used < 8 * results
    assert len(list(restore_clip(Fourfold(), clip[:2]))) == 3


def work(cut: Cut, size: tuple[int, int]) -> int:
    height, width = size
    side = cut.tile or max(size)
    rows, columns = (1 if side >= n else 1 + -(-(n - side) // (side - 16)) for n in (height, width))
    return rows * columns * min(side, height) * min(side, width)


def test_more_memory_is_never_more_work():
    size, before = (184, 320), math.inf
    model = Known()
    for budget in range(500, 3200, 100):
        cut = fit(model, size, budget * MB, windows=(4,))
        assert cut.needed <= budget * MB
        assert cut.window == 4
        assert work(cut, size) <= before
        before = work(cut, size)
    assert cut.tile is None


def test_the_cut_is_what_the_streamer_takes():
    for budget in (350, 420, 600, 900):
        cut = fit(Known(), (90, 123), budget * MB)
        frames = restore_clip(Fourfold(), torch.rand(5, 3, 90, 123), window=cut.window, tile=cut.tile)
        assert [frame.shape for frame in frames] == [(3, 360, 492)] * 9


def test_windows_stay_long_as_long_as_tiles_are_not_tiny():
    model, size = Known(), (184, 320)
    cuts = [fit(model, size, budget * MB) for budget in (300, 400, 500, 700, 900, 1500, 3500)]
    windows = [cut.window for cut in cuts]
    assert windows == sorted(windows)
    assert windows[0] < 4 == windows[-1]
    assert all((cut.tile or 320) >= 2 * least_tile(model.net, 16) for cut in cuts if cut.window > 2)
    assert fit(model, size, 3500 * MB, windows=(9,)).window == 9
    assert fit(model, size, 3500 * MB, windows=(1,)).window == 2  # the least of the network
    assert fit(model, size, 3500 * MB, temporal_overlap=3, windows=(4, 3, 2)).window == 4


def test_a_given_tile_stays():
    cut = fit(Known(), (184, 320), 3500 * MB, tile=48)
    assert (cut.window, cut.tile) == (4, 48)
    assert fit(Known(), (184, 320), 500 * MB, tile=64).window < 4


def test_too_little_memory_names_what_would_do():
    with pytest.raises(ValueError, match=r"^120M of memory is too little for frames of 320x180: at least") as caught:
        fit(Known(), (180, 320), 120 * MB, writing=20 * MB)
    least = parse_bytes(re.search(r"at least (\d+M) is needed", str(caught.value))[1])
    assert fit(Known(), (180, 320), least, writing=20 * MB).tile == 32
    with pytest.raises(ValueError, match="too little"):
        fit(Known(), (180, 320), least - 2 * MB, writing=20 * MB)


def test_frames_and_writers_count_on_a_cpu():
    size = 184, 320
    lean, rich = (fit(Known(), size, 4000 * MB, writing=writing * MB).needed for writing in (0, 100))
    assert rich - lean == 100 * MB
    assert frames_bytes(Fourfold(), size, 4) > 2 * 7 * 16 * 184 * 320 * 12
    assert writing_bytes(10**6, threads=4) == 4 * writing_bytes(10**6, threads=1)
    assert writing_bytes(1280 * 720, threads=None) > 274 * MB  # measured with libx264
    model = Known()
    model.on_cpu = False  # as on a GPU, whose memory holds the network alone
    assert fit(model, size, 4000 * MB).needed == pytest.approx(100 * MB + 1.05 * 4 * (MB + 1e4 * 184 * 320))


def test_words():
    assert str(Cut(4, 64, 3 << 30)) == "4 frames at once, tiles of 64 pixels, about 3G"
    assert str(Cut(3, None, 800 * MB)) == "3 frames at once, whole frames, about 800M"


def test_where_memory_cannot_be_measured(monkeypatch):
    monkeypatch.setattr("restore.budget.keep_freed_memory", lambda: False)
    with pytest.raises(ValueError, match=r"cpu cannot be measured .* --window and --tile"):
        MemoryModel(Fourfold())
