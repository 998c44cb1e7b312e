"""The dry run: everything is built, one step is made, nothing is written."""

import re

import pytest
from tiny import COMPACT

import train as command
from archs import ARCHS
from restore.cost import best_seconds, count_gmac, count_parameters


def dry(options_file, capsys, *overrides):
    root = options_file.parent / "runs"
    arguments = ["-opt", str(options_file), "--dry-run", "--set", f"path.experiments={root}"]
    code = command.main([*arguments, *(item for pair in overrides for item in ("--set", pair))])
    return code, capsys.readouterr(), root


def test_it_says_what_the_run_would_cost_and_writes_nothing(options_file, capsys):
    code, said, root = dry(options_file, capsys, "train.total_iter=7200", "train.accum_iter=2")
    assert code == 0 and not said.err
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert list(lines) == ["network", "clip", "data", "step", "memory", "disk", "whole", "test"]
    assert re.search(r"STDAN, [\d,]+ parameters, on cpu", lines["network"])
    assert lines["clip"].startswith("3 x 8x8 -> 5 x 32x32, ")
    assert lines["data"].startswith("1 stretches of 1 clips")
    seconds = float(re.search(r"4 clips in ([\d.]+) s", lines["step"])[1])
    hours, minutes, rest = map(int, re.search(r"about (\d+):(\d+):(\d+)", lines["whole"]).groups())
    assert 3600 * hours + 60 * minutes + rest == pytest.approx(7200 * seconds, rel=0.1, abs=7200 * 0.005)
    assert lines["test"] == "set   val: 1 clips"
    assert not root.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network_g.heads=3", "error: "),
        ("datasets.val={type: TestClips, dataroot_gt: nowhere}", "nowhere"),
        ("datasets.train={type: Vimeo90K, dataroot_gt: nowhere}", "options/sample.yml"),
    ],
)
def test_what_training_refuses_the_dry_run_refuses(options_file, capsys, override, message):
    code, said, root = dry(options_file, capsys, override)
    assert code == 2 and message in said.err and said.err.count("\n") == 1
    assert not root.exists()


def test_costs_are_counted():
    network = ARCHS["stdan"](**COMPACT).eval()
    assert count_parameters(network) == sum(p.numel() for p in network.parameters())
    once, twice = (count_gmac(network, 2, 16, width) for width in (16, 32))
    assert 0 < 1.9 * once < twice < 2.1 * once


def test_the_first_call_is_not_timed():
    calls = []
    assert best_seconds(lambda: calls.append(1), 3) >= 0 and len(calls) == 4
