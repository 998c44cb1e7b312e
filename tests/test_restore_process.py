"""`python -m restore` in processes of its own: peak memory, interruption, nothing half-written."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from restore.frames import open_clips, read_image
from restore.writers import FrameFolderWriter

# The command, once for every line of arguments, with a network that only enlarges, by way of large intermediate
# results. After each its own peak memory is printed. BUDGET is 200 MB more than the process holds at first.
COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored
import torch
import restore.__main__ as cli
from archs import VideoNet
from restore.memory import peak_during_mb, resident_bytes

class Enlarged(VideoNet):
    scale, time_scale, multiple_of, min_frames = 4, 2, 8, 2

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(4))

    def forward(self, clip):
        time.sleep(float(sys.argv[1]))
        both = torch.cat([clip[:, :-1].repeat_interleave(2, 1), clip[:, -1:]], 1)
        wide = both.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., None] * self.gain
        return wide.mean(-1)

cli.load_for_task = lambda *_, **__: ("enlarged", Enlarged())
budget = (resident_bytes() >> 20) + 200
print("budget", budget)
for line in sys.argv[2:]:
    codes = []
    arguments = [*line.replace("BUDGET", f"{budget}M").split(), "--device", "cpu", "--fp32"]
    print("peak", peak_during_mb(lambda: codes.append(cli.main(arguments))))
sys.exit(codes[-1])
"""


def start(folder: Path, *lines: str, seconds: float = 0) -> subprocess.Popen[str]:
    """The command in a folder, with a network each of whose calls takes at least so long."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(seconds), *lines],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def frames(path: Path, count: int, height: int, width: int) -> None:
    """A folder of frames, of which two are different."""
    colours = torch.rand(2, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    with FrameFolderWriter(path) as writer:
        for n in range(2):
            writer.write(f"{n:04d}", colours[n].repeat_interleave(8, -1).repeat_interleave(8, -2))
    for n in range(2, count):
        (path / f"{n:04d}.png").hardlink_to(path / f"{n % 2:04d}.png")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process its peak memory")
def test_memory_keeps_to_a_budget_and_does_not_grow_with_the_length(tmp_path):
    frames(tmp_path / "large", 4, 160, 192)
    frames(tmp_path / "many", 170, 48, 64)
    lines = "large -o cut --max-memory BUDGET", "large -o whole", "many -o short --frames 20", "many -o long"
    process = start(tmp_path, *lines)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    budget, cut, whole, short, long = (int(number) for number in re.findall(r"(?:budget|peak) (\d+)", out))

    assert re.search(r"large: [234] frames at once, tiles of \d+ pixels, about \d+M\nlarge: 7 frames 768x640", out)
    assert cut <= budget < whole
    for name in ("0000.png", "0002_5.png", "0003.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    assert len(list((tmp_path / "long").iterdir())) == 339
    # 300 more results are 177 MB, were they kept. Where the allocator finds room differs by 30 MB from run to run.
    assert long <= short + 60


def test_interruption_is_prompt_and_leaves_nothing_half_written(tmp_path):
    frames(tmp_path / "in", 60, 64, 96)
    process = start(tmp_path, "in -o out", seconds=0.5)
    while process.poll() is None and len(list(tmp_path.glob("out/*.png"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    kept = re.fullmatch(r"restore: interrupted at in; the (\d+) finished frames stay in out\n", err)
    files = sorted((tmp_path / "out").iterdir())
    assert 2 <= len(files) == int(kept[1]) < 119
    assert {read_image(file).shape for file in files} == {(3, 256, 384)}
    assert open_clips(tmp_path / "out")[0].frame_names == [f"{n // 2:04d}" + "_5" * (n % 2) for n in range(len(files))]
