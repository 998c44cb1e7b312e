"""Exported networks do what the networks do, say what they are, and are written whole or not at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from test_contract import NETWORKS, build, clip_for
from tiny import ALONE, PUBLISHED, awaken, seeded_clip, unchecked
from torch import Tensor, nn

from archs import STDAN, VideoNet
from archs.layers.energy_attention import EnergyFusion
from archs.layers.frequency_align import SpectrumGuidance
from archs.layers.motion_distillation import MotionBranch
from archs.layers.multi_frequency import FrequencyEnhancement
from archs.layers.spectral import irfft2, local_energy, rfft2
from restore import export
from restore.checkpoint import WEIGHTS, load_network, save_network
from restore.export import METADATA, ExportError, main
from restore.real_graph import RealGraph, has_spectra

SMALLEST = {**PUBLISHED, "heads": 1, "encoder_depths": (1,), "levels": 1, "window": 4}


@pytest.fixture(autouse=True)
def _annotations_off():
    """A tracer looks into the tests' enforcement of annotations, too."""
    with unchecked():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of the network that is exported the fastest: every frame restored alone."""
    path = tmp_path_factory.mktemp("weights") / "alone.safetensors"
    torch.manual_seed(0)
    save_network(path, awaken(STDAN(**ALONE)), {"type": "stdan", **ALONE})
    return path


def window(width: int = 8) -> list[str]:
    return ["--frames", "2", "--height", "8", "--width", str(width)]


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def traced(network: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    return export.export(network.requires_grad_(False), *inputs)


# ---- the command


def test_pt2_runs_elsewhere_and_says_what_it_is(weights, tmp_path, capsys):
    target = tmp_path / "folder" / "net.pt2"
    assert main([str(weights), "-o", str(target), *window()]) == 0
    assert "clips of 2 x 8x8" in capsys.readouterr().out
    extra = {METADATA: ""}
    program = torch.export.load(target, extra_files=extra)
    clip = seeded_clip(1, 2, 3, 8, 8, seed=3)
    with torch.no_grad():
        assert largest_difference(program.module()(clip), load_network(weights)(clip)) < 1e-5
    said = json.loads(extra[METADATA])
    assert said["network"] == {"type": "stdan", **json.loads(json.dumps(ALONE))}
    assert (said["scale"], said["time_scale"]) == (1, 1)
    assert (said["frames"], said["height"], said["width"]) == (2, 8, 8)
    assert said["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert [path.name for path in target.parent.iterdir()] == ["net.pt2"]


def test_onnx_runs_elsewhere_and_says_what_it_is(weights, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "net.onnx"
    target.write_text("older")
    assert main([str(weights), "-o", str(target), "--overwrite", *window()]) == 0
    assert "opset 18" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    clip = seeded_clip(1, 2, 3, 8, 8, seed=3)
    (restored,) = session.run(["restored"], {"clip": clip.numpy()})
    with torch.no_grad():
        assert largest_difference(torch.from_numpy(restored), load_network(weights)(clip)) < 1e-5
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["network"])["type"] == "stdan"
    assert (said["scale"], said["frames"], said["weights"]) == ("1", "2", "alone.safetensors")


def test_a_shipped_model_is_described_by_its_name():
    network = load_network("stdan_s")
    said = export.describe("stdan_s", network, seeded_clip(1, 4, 3, 8, 16))
    assert said["network"]["type"] == "stdan" and (said["scale"], said["time_scale"]) == (4, 2)
    assert said["sha256"] == hashlib.sha256((WEIGHTS / "stdan_s.safetensors").read_bytes()).hexdigest()


# ---- bad input: one line, exit 2, nothing on disk


@pytest.mark.parametrize(
    ("name", "target", "flags", "said"),
    [
        ("nowhere", "net.pt2", window(), "neither a file nor a shipped model"),
        (None, "net.pt", window(), "net.pt: the suffix says which format: .pt2 or .onnx"),
        (None, "net.pt2", window(10), "this network needs multiples of 4, such as --height 8 --width 12"),
        (None, "net.pt2", ["--frames", "0"], "--frames 0: this network needs at least 1"),
    ],
)  # fmt: skip
def test_bad_input(weights, tmp_path, capsys, name, target, flags, said):
    assert main([name or str(weights), "-o", str(tmp_path / target), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays(weights, tmp_path, capsys):
    target = tmp_path / "net.pt2"
    target.write_text("mine")
    assert main([str(weights), "-o", str(target), *window()]) == 2
    assert "net.pt2: exists; replace it with --overwrite" in capsys.readouterr().err
    assert target.read_text() == "mine"


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_a_program_that_does_something_else_is_not_written(weights, tmp_path, capsys, monkeypatch, wrong):
    run = export.run_pt2
    monkeypatch.setattr(export, "run_pt2", lambda content, clip: run(content, clip) + wrong)
    assert main([str(weights), "-o", str(tmp_path / "net.pt2"), *window()]) == 2
    assert f"by up to {wrong:.2g}, more than 0.001" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda package: None if package == "onnxscript" else package)
    assert main([str(weights), "-o", str(tmp_path / "net.onnx"), *window()]) == 2
    assert "pip install onnxscript, or write a .pt2" in capsys.readouterr().err


class _Net(VideoNet):
    """With a part that does ``change``."""

    def __init__(self, change) -> None:
        super().__init__()
        self.part = _Applied(change)

    def forward(self, clip):
        return self.part(clip)


class _Applied(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_data_dependent_control_flow_is_refused():
    with pytest.raises(ExportError, match=r"_Net cannot be traced by torch.export: .*data-dependent"):
        traced(_Net(lambda x: x if x.sum() > 0 else -x), seeded_clip(1, 2, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: irfft2(rfft2(x).exp(), x.shape[-2:]), "part: aten.exp.default of complex numbers"),
        (lambda x: irfft2(rfft2(x) + 1.0, x.shape[-2:]), "part: aten.add.Tensor of complex numbers"),
        (lambda x: irfft2(1.0 / (rfft2(x) + rfft2(x)), x.shape[-2:]), "part: aten.mul.Tensor of complex|reciprocal"),
        (torch.special.bessel_j0, "part: ONNX has no .*bessel_j0"),
    ],
)
def test_what_onnx_cannot_do_is_named_with_its_place(change, said):
    pytest.importorskip("onnxscript")
    clip = seeded_clip(1, 2, 3, 8, 8)
    with pytest.raises(ExportError, match=rf"^{said}.*; export to a .pt2"):
        export.to_onnx(traced(_Net(change), clip), clip, {})


# ---- without complex numbers: the same numbers


class _Guidance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.guidance = SpectrumGuidance(8, 2, 1, projected=4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        spectra = self.guidance.spectra([x[None]])
        given = self.guidance.toward(spectra.frames(slice(-1)), spectra.frames(slice(1, None)))[0]
        return tuple(given)


class _Fusion(EnergyFusion):
    def forward(self, x: Tensor) -> Tensor:
        values = torch.stack([x, x.flip(-1)], dim=1)
        return super().forward(values, values.mean(2), x, self.detail(values)[:, :, 0])


SPECTRAL = {
    "product": _Applied(lambda x: irfft2(rfft2(x) * rfft2(x), x.shape[-2:])),
    "no image's spectrum": _Applied(lambda x: irfft2(torch.complex(x, x.flip(0)), (x.shape[-2], 28))),
    "local energy": _Applied(local_energy),
    "radial": FrequencyEnhancement(8),
    "global": FrequencyEnhancement(8, filter="global", grid=(8, 8)),
    "guidance": _Guidance(),
    "fusion": _Fusion(8),
    "motion": MotionBranch(8, window=8),
    "time": _Applied(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1, norm="ortho"), n=8, dim=1, norm="ortho") + x),
}


@pytest.mark.parametrize("case", SPECTRAL)
def test_real_form_equals_spectra(case):
    module = awaken(SPECTRAL[case]).eval()
    inputs = [seeded_clip(2, 8, 13, 15, seed=seed) for seed in range(2 if case == "motion" else 1)]
    program = traced(module, *inputs)
    with torch.no_grad():
        expected, result = module(*inputs), RealGraph(program)(*inputs)
    assert has_spectra(program)
    pairs = [(result, expected)] if isinstance(expected, Tensor) else zip(result, expected, strict=True)
    for a, b in pairs:
        assert largest_difference(a, b) < 2e-6 * float(b.abs().max())


def test_real_form_has_no_complex_tensor_left():
    clip = seeded_clip(2, 8, 8, 8)
    real = traced(RealGraph(traced(SPECTRAL["product"], clip)), clip)
    values = [node.meta.get("val") for node in real.graph.nodes]
    assert not has_spectra(real)
    assert not any(value.is_complex() for value in values if isinstance(value, Tensor))


# ---- whole networks


def test_stdan_is_the_same_after_a_pt2():
    torch.manual_seed(0)
    network = awaken(STDAN(**SMALLEST)).eval()
    clip = clip_for(network, rows=1, columns=1)
    restored = export.run_pt2(export.to_pt2(traced(network, clip), {}), clip)
    with torch.no_grad():
        assert largest_difference(restored, network(clip)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("case", NETWORKS)
def test_every_network_is_the_same_after_an_export(case, kind):
    network = build(case)
    side = max(network.multiple_of, 8)
    clip = export.seeded_clip(network.min_frames, side, 2 * side)
    program = traced(network, clip)
    if kind == "pt2":
        restored = export.run_pt2(export.to_pt2(program, {}), clip)
    else:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        restored = export.run_onnx(export.to_onnx(program, clip, {}), clip)
    with torch.no_grad():
        assert largest_difference(restored, network(clip)) < 1e-4
