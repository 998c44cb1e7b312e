"""bench.gpu where there is no card: it says so, and its tables are made on a CPU, small."""

import pytest
import torch

from archs.layers.deform_backends import choice
from bench import gpu

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "no CUDA device" in said.err


def test_limits():
    assert gpu.convolution_gflops("fp32", CPU, (16, 16)) > 0 and gpu.copy_gbytes(CPU, 2**16) > 0


def test_kernels_against_the_oracle(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # too slow for a table
    rows = list(gpu.kernel_rows(CPU, torch.float32, 1.0, 1, batch=1, channels=4, groups=2, size=(8, 9)))
    backends = dict.fromkeys(["torch", choice("cpu").sampling])
    assert [(row["backend"], row["job"]) for row in rows] == [
        (name, job) for name in backends for job in ("taps", "sum", "dot", "attend")
    ]
    for row in rows:
        assert row["max_error"] < 1e-5 and row["max_gradient_error"] < 1e-4
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["share_of_copy"] > 0


def test_networks():
    rows = list(gpu.network_rows("stdan_s", CPU, {"fp32": 100.0}, 1, calls=("eager", "graph"), size=(8, 8)))
    assert [row["call"] for row in rows] == ["eager", "graph"]
    assert rows[0]["share_of_limit"] > 0 and rows[0]["frames_per_s"] == pytest.approx(7e3 / rows[0]["ms"])
    if not torch.cuda.is_available():
        assert "failed" in rows[1] and "ms" not in rows[1]


def test_tf32_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with gpu.computing_in("tf32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
