"""The benchmarks: they run, their table is complete, the plain formulation they compare with is the same network."""

import json

import torch
from seeded import assert_match
from tiny import PUBLISHED, awaken, seeded_clip

from archs import STDAN
from bench import deformable, step, table
from bench.plain import plain_forward


def small() -> STDAN:
    torch.manual_seed(0)
    return awaken(STDAN(**PUBLISHED))


def test_the_plain_formulation_is_the_network():
    network, clip = small().eval(), seeded_clip(2, 4, 3, 16, 8)
    with torch.no_grad():
        assert_match(plain_forward(network, clip), network(clip))
    assert_match(plain_forward(network, clip).detach(), network(clip).detach())  # where layers are not at once


def test_a_training_step():
    network = small()
    before = [parameter.clone() for parameter in network.parameters()]
    for recompute in (False, True):
        row = step.measure(network, plain=False, recompute=recompute, crop=8, runs=1)
        assert row["seconds"] > 0
    assert any((a != b).any() for a, b in zip(before, network.parameters(), strict=True))


def test_deformable():
    row = deformable.measure("fp32", (8, 8), 1)
    assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["convolution_ms"] > 0


def test_table(tmp_path, monkeypatch, capsys):
    called = []

    def rows_of(module, *arguments, **environment):
        called.append((module, *arguments))
        if module == "step":
            flags = {"plain": "--plain" in arguments, "recompute": "--recompute" in arguments}
            return [step.measure(small(), **flags, crop=8, runs=1)]
        if module == "deformable":
            return [deformable.measure("fp32", (8, 8), 1)]
        return real(module, *arguments, **environment)

    real = table.rows_of
    monkeypatch.setattr(table, "rows_of", rows_of)
    output = tmp_path / "results/bench.json"
    table.main(["stdan_s", "--size", "8x8", "--crop", "8", "--runs", "1", "--threads", "1", "--output", str(output)])
    written, text = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["precision"] for row in written["networks"]] == ["fp32", "bf16"]
    assert set(written["training"]) == {"plain", "fast", "recomputing"}
    assert len(written["deformable"]) == 1 and "AMX" in written["machine"]
    assert "stdan_s" in text and "recomputing" in text and "x convolution" in text
    assert {call[0] for call in called} == {"speed", "step", "deformable"}
