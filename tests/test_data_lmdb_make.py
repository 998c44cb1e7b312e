"""Databases are made in BasicSR's layout, go on after a kill, and refuse what is not theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb")

from tiny import ROOT  # noqa: E402

from restore.lmdb_make import frames_below, main  # noqa: E402 - after the check for the package

SLOWLY = """
import sys, time
import restore.lmdb_make as command
command.BATCH = 4
entry = command.Plan.entry
command.Plan.entry = lambda plan, file: (time.sleep(0.03), entry(plan, file))[1]
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "sequences"
    for clip in ("00001/0001", "00001/0002", "00002/0001"):
        (folder / clip).mkdir(parents=True)
        for i in range(1, 8):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 12, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / clip / f"im{i}.png"), pixels)
    return folder


def contents(database: Path) -> dict[str, bytes]:
    with lmdb.open(str(database), readonly=True, lock=False) as opened, opened.begin() as transaction:
        return {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}


def make(*arguments: object) -> int:
    return main([*map(str, arguments), "--jobs", "1"])


def test_a_database_in_the_layout_of_basicsr(source, tmp_path, capsys):
    assert make(source, tmp_path / "a.lmdb") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.lmdb'}: 21 frames\n"
    lines = (tmp_path / "a.lmdb" / "meta_info.txt").read_text().splitlines()
    assert len(lines) == 21 and lines[0] == "00001/0001/im1.png (8,12,3) 1"
    stored = contents(tmp_path / "a.lmdb")
    assert stored["00002/0001/im7"] == (source / "00002/0001/im7.png").read_bytes()
    assert stored.keys() == {line.split(".png")[0] for line in lines}


def test_a_killed_command_continues(source, tmp_path, capsys):
    target = tmp_path / "a.lmdb"
    command = [sys.executable, "-c", SLOWLY, str(source), str(target), "--scale", "4", "--jobs", "1"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
        part = target / "meta_info.txt.part"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.read_text().count("\n") >= 8) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    begun = contents(target)
    assert 4 <= len(begun) < 21 and not (target / "meta_info.txt").exists()
    part.write_text(part.read_text()[:-3])  # as if the last line had been cut off
    assert make(source, target, "--scale", "4") == 0
    assert make(source, tmp_path / "b.lmdb", "--scale", "4") == 0
    assert contents(target) == contents(tmp_path / "b.lmdb")
    assert (target / "meta_info.txt").read_text() == (tmp_path / "b.lmdb" / "meta_info.txt").read_text()
    assert not part.exists()
    before = (target / "data.mdb").stat().st_mtime_ns
    assert make(source, target, "--scale", "4") == 0  # complete: nothing is written
    assert (target / "data.mdb").stat().st_mtime_ns == before
    capsys.readouterr()


def test_new_frames_are_added(source, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("00001/0001\n\n")
    assert make(source, tmp_path / "a.lmdb", "--list", listing) == 0
    listing.write_text("00001/0001\n00002/0001\n")
    assert make(source, tmp_path / "a.lmdb", "--list", listing) == 0
    assert len((tmp_path / "a.lmdb" / "meta_info.txt").read_text().splitlines()) == 14


def test_a_database_grows_beyond_its_first_size(source, tmp_path, monkeypatch):
    monkeypatch.setattr("restore.lmdb_make.SPACE", 2**15)
    assert make(source, tmp_path / "a.lmdb", "--raw") == 0
    assert len(contents(tmp_path / "a.lmdb")) == 21


def test_what_is_refused(source, tmp_path, capsys):
    def error(*arguments: object) -> str:
        assert make(*arguments) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        return message.removeprefix("lmdb_make: error: ")

    target = tmp_path / "a.lmdb"
    assert make(source, target) == 0
    assert error(source / "00001", target) == f"{target}: was made with source {source}: take another DST, or delete it"
    assert "was made with scale 1" in error(source, target, "--scale", 2)
    (source / "00001/0002/im3.png").unlink()
    assert error(source, target) == f"{target}: holds 00001/0002/im3, which is not in {source}: take another DST"
    (source / "00001/0002/im3.png").write_bytes(b"no image")
    assert "im3.png: not an image that can be decoded" in error(source, tmp_path / "b.lmdb")
    assert "not empty" in error(source, source)
    listing = tmp_path / "list.txt"
    listing.write_text("00007/0001\n")
    assert "1 of 1 listed clips are missing: 00007/0001" in error(source, tmp_path / "c.lmdb", "--list", listing)
    assert "no such folder" in error(tmp_path / "nowhere", tmp_path / "c.lmdb")
    assert not (tmp_path / "c.lmdb").exists()
    cv2.imwrite(str(source / "00001/0002/im3.png"), np.zeros((4, 4, 3), np.uint8))
    assert "raw frames must be of one size" in error(source, tmp_path / "d.lmdb", "--raw")


def test_hidden_files_are_passed_over(source):
    (source / "00001/0001/._im1.png").write_bytes(b"")
    (source / "notes.txt").write_text("")
    assert len(frames_below(source, None)) == 21
