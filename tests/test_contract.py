"""What every network of `ARCHS` promises: shapes, sizes, gradients, precisions, weights on disk, graphs."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ALONE,
    COMPACT,
    DEBLUR,
    FREQUENCY,
    FUSION,
    HALF,
    HALF_RECURRENT,
    JOINT,
    PUBLISHED,
    RECURRENT,
    ROOT,
    WITH_ATM,
    WITH_DTF,
    awaken,
    relative_error,
    run_python,
    seeded_clip,
)
from torch import Tensor
from torch.nn import functional as F

from archs import ARCHS, VideoNet
from restore.checkpoint import load_network, save_network

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # name of the case -> name in ARCHS, arguments of a small one
    "stdan": ("stdan", PUBLISHED),
    "stdan, compact": ("stdan", COMPACT),
    "stdan, recurrent": ("stdan", RECURRENT),
    "stdan, alone": ("stdan", ALONE),
    "stdan_freq": ("stdan_freq", FREQUENCY),
    "stdan_freq, deblurring": ("stdan_freq", {**DEBLUR, **FUSION}),
    "stdan_freq, half grid": ("stdan_freq", {**HALF, **FUSION, "dct_condition": True}),
    "stdan, half grid, recurrent": ("stdan", HALF_RECURRENT),
    "stdan, joint": ("stdan", JOINT),
    "stdan_freq, dtf": ("stdan_freq", WITH_DTF),
    "stdan_freq, atm": ("stdan_freq", WITH_ATM),
}
GRAPHS = (  # one of every kind: tracing takes long
    "stdan", "stdan, recurrent", "stdan, half grid, recurrent", "stdan_freq", "stdan_freq, deblurring",
    "stdan_freq, dtf", "stdan_freq, atm",
)  # fmt: skip
WITHOUT_GRADIENT: dict[str, set[str]] = {}  # case -> parameters that no gradient reaches, with the reason beside it

every_network = pytest.mark.parametrize("case", NETWORKS)


def build(case: str) -> VideoNet:
    """The case's network, nothing left at zero, in eval mode."""
    name, arguments = NETWORKS[case]
    torch.manual_seed(0)
    return awaken(ARCHS[name](**arguments)).eval()


def clip_for(network: VideoNet, *, frames: int = 0, batch: int = 1, rows: int = 2, columns: int = 3) -> Tensor:
    side = network.multiple_of if network.multiple_of >= 8 else 8
    return seeded_clip(batch, frames or network.min_frames, 3, rows * side, columns * side)


def test_every_architecture_is_here():
    assert {name for name, _ in NETWORKS.values()} == set(ARCHS)


@pytest.mark.parametrize("name", ARCHS)
def test_arguments_are_plain_keywords(name):
    parameters = list(inspect.signature(ARCHS[name].__init__).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)


@every_network
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_shape(case, extra):
    network = build(case)
    clip = clip_for(network, frames=network.min_frames + extra, batch=2)
    b, t, _, h, w = clip.shape
    with torch.no_grad():
        result = network(clip)
    assert result.shape == (b, (t - 1) * network.time_scale + 1, 3, network.scale * h, network.scale * w)
    assert result.shape[1] == network.frames_out(t)
    assert result.dtype == torch.float32 and result.isfinite().all()


@every_network
@pytest.mark.parametrize("size", [(5, 11), (17, 9)])
def test_odd_sizes_once_padded(case, size):
    network = build(case)
    pad = [-length % network.multiple_of for length in size]
    clip = seeded_clip(1, network.min_frames, 3, *size)
    padded = F.pad(clip.flatten(0, 1), (0, pad[1], 0, pad[0]), mode="replicate").unflatten(0, clip.shape[:2])
    with torch.no_grad():
        assert network(padded).shape[-2:] == tuple(network.scale * length for length in padded.shape[-2:])
    if any(pad):
        with pytest.raises(ValueError, match=f"divisible by {network.multiple_of}"):
            network(clip)


@every_network
def test_the_input_is_left_alone(case):
    network = build(case)
    clip = clip_for(network)
    before = clip.clone()
    with torch.no_grad():
        assert torch.equal(network(clip), network(clip))
    assert torch.equal(clip, before)


@every_network
def test_gradient_reaches_every_parameter(case):
    network = build(case).train()
    torch.manual_seed(1)
    network(clip_for(network, frames=4)).square().sum().backward()
    silent = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == WITHOUT_GRADIENT.get(case, set())
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@every_network
def test_bf16_autocast_is_close(case):
    network = build(case)
    clip = clip_for(network, frames=3)
    with torch.no_grad():
        exact = network(clip)
        with torch.autocast("cpu", torch.bfloat16):
            result = network(clip)
    assert result.isfinite().all()
    assert relative_error(result, exact) < 0.03


@every_network
def test_bf16_weights_run(case):
    network = build(case)
    clip = clip_for(network, frames=3)
    with torch.no_grad():
        exact = network(clip)
        result = network.to(torch.bfloat16)(clip.bfloat16())
    assert relative_error(result, exact) < 0.06


@every_network
def test_weights_survive_the_disk(case, tmp_path):
    network, (name, arguments) = build(case), NETWORKS[case]
    save_network(tmp_path / "net.safetensors", network, {"type": name, **arguments})
    loaded = load_network(tmp_path / "net.safetensors")
    assert type(loaded) is type(network) and not loaded.training
    clip = clip_for(network)
    with torch.no_grad():
        assert torch.equal(loaded(clip), network(clip))
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


FOR_ONE_DEVICE = {"deform_backends.py", "deform_triton.py", "deform_triton_attention.py"}  # the choice, and its kernels


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "archs").rglob("*.py")) if path.name not in FOR_ONE_DEVICE],
    ids=lambda path: path.name,
)
def test_no_device_is_named(path: Path):
    text = path.read_text().lower()
    assert "cuda" not in text and ".to(\"" not in text


# ---- graphs, in a fresh interpreter: enforced annotations would break them


def report_graphs() -> None:
    """Print as JSON what `torch.export` and `torch.compile` make of networks: a mean error, or why they fail.

    The eager call comes last: a network must still be usable, whatever has traced it before.
    """
    report = {}
    for tool, convert in (("export", _exported), ("compile", _compiled)):
        for case in GRAPHS:
            network = build(case).requires_grad_(False)
            clip = clip_for(network, rows=1, columns=2)
            try:
                report[f"{tool} {case}"] = relative_error(convert(network, clip)(clip), network(clip))
            except Exception as error:  # whatever the tool raises is the finding
                report[f"{tool} {case}"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(report))


def _exported(network: VideoNet, clip: Tensor) -> Any:
    return torch.export.export(network, (clip,)).module()


def _compiled(network: VideoNet, clip: Tensor) -> Any:
    torch._dynamo.reset()  # or it takes sizes that differ from the case before for variable: many times slower
    return torch.compile(network, fullgraph=True, backend="eager")


@pytest.fixture(scope="module")
def graphs() -> dict[str, float | str]:
    done = run_python("import test_contract; test_contract.report_graphs()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", GRAPHS)
@pytest.mark.parametrize("tool", ["compile", "export"])
def test_graph_without_break_gives_the_same_numbers(graphs, tool, case):
    found = graphs[f"{tool} {case}"]
    assert not isinstance(found, str), found
    assert found < 1e-4
