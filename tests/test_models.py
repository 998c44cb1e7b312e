"""Shipped models: tasks, the list, hashes, cards, and how a run's weights become one."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from tiny import ALONE, COMPACT, DEBLUR, JOINT, ROOT

import restore.__main__ as cli
from archs import STDAN
from bench import ship_weights
from bench.model_card import card
from restore import checkpoint, manifest
from restore.checkpoint import CheckpointError, load_network, read_info, save_network, shipped_models
from restore.models import (
    DEFAULTS,
    TASKS,
    default_model,
    derived_task,
    described,
    listing,
    load_for_task,
    models,
    shipped_for,
)
from restore.schema import parse

JOINT_SR = {"task": "deblur+sr"}  # the shape is that of sr
ABOUT = {
    "task": "deblur",
    "licence": "Apache-2.0",
    "summary": "a tiny network for tests",
    "data": "none, it is fresh",
    "trained": "not at all",
    "options": "options/deblur_sample.yml",
    "command": "python train.py -opt options/deblur_sample.yml",
    "scores": [{"set": "noise", "psnr": 30.0, "ssim": 0.9, "protocol": "on RGB", "command": "none"}],
    "limits": ["It changes nothing."],
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# ---- what ships


def test_the_manifest_names_what_is_in_the_folder():
    folder = checkpoint.WEIGHTS
    assert manifest.recorded(folder).keys() == {path.name for path in folder.glob("*.safetensors")} != set()
    assert (folder / manifest.MANIFEST).read_text() == manifest.written(folder, "*.safetensors")
    done = subprocess.run(["sha256sum", "-c", manifest.MANIFEST], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_says_what_it_is(name):
    """Its metadata is what stands in the YAML file beside it, its card is made of that, and it is for its task."""
    model = described(name)
    about = ship_weights.read_about(model.path.with_suffix(".yml"))
    assert {key: model.info[key] for key in ship_weights.as_dict(about)} == ship_weights.as_dict(about)
    assert model.path.with_suffix(".md").read_text(encoding="utf-8") == card(model)
    assert model.task in TASKS and (TASKS[model.task].scale, TASKS[model.task].time_scale) == (
        model.scale, model.time_scale
    )  # fmt: skip
    assert model.path.stat().st_size <= ship_weights.MOST_BYTES
    assert (ROOT / about.options).is_file()


def test_every_task_with_several_models_has_a_default():
    for task in TASKS:
        names = shipped_for(task)
        assert len(names) < 2 or DEFAULTS[task] in names
        assert not names or default_model(task) in names
    assert default_model("sr") == checkpoint.DEFAULT_MODEL
    assert sum(path.stat().st_size for path in checkpoint.WEIGHTS.glob("*.safetensors")) <= 30_000_000


def test_the_package_holds_the_whole_folder():
    """An installed package without hashes would refuse its own models."""
    (patterns,) = re.findall(r"^restore = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    packed = {path for pattern in yaml.safe_load(patterns) for path in (ROOT / "restore").glob(pattern)}
    assert set(checkpoint.WEIGHTS.iterdir()) <= packed


@pytest.mark.parametrize("task", TASKS)
def test_recipes_name_options_that_exist(task):
    (file,) = re.findall(r"options/\w+\.yml", TASKS[task].recipe)
    assert (ROOT / file).is_file()


# ---- tasks


def test_a_task_takes_its_network(ship):
    ship("large", COMPACT)
    ship("joint", COMPACT, **JOINT_SR)
    ship("sharp", ALONE, task="deblur")
    assert [model.name for model in models()] == ["joint", "large", "sharp"]
    assert [model.name for model in models("sr")] == ["large"]
    for task, name in (("sr", "large"), ("deblur+sr", "joint"), ("deblur", "sharp")):
        found, network = load_for_task(task, None)
        assert found == name and (network.scale, network.time_scale) == (TASKS[task].scale, TASKS[task].time_scale)
    assert load_for_task("sr", "large")[0] == "large"


@pytest.mark.parametrize(
    ("arguments", "task"),
    [(COMPACT, "sr"), (JOINT, "interpolate"), (ALONE, "deblur"), ({**ALONE, "scale": 4}, "upscale")],
)
def test_a_file_that_says_no_task_is_taken_for_what_its_shape_allows(ship, arguments, task):
    path = ship("a_net", arguments)
    assert derived_task(load_network(path)) == described("a_net").task == task
    for name, wanted in TASKS.items():
        fits = (wanted.scale, wanted.time_scale) == (TASKS[task].scale, TASKS[task].time_scale)
        if fits:  # whether it was trained on blurred frames cannot be seen
            assert load_for_task(name, str(path))[0] == str(path)
        else:
            with pytest.raises(ValueError, match=rf"task {re.escape(name)}: .*a_net.* is x\d in space, x\d in time, "):
                load_for_task(name, str(path))


REFUSED = {
    ("deblur", "large"): "large is for sr, deblur is x1 in space, x1 in time; shipped models for deblur: sharp",
    ("sr", "joint"): "joint is for deblur+sr; shipped models for sr: large",
    ("deblur+sr", "sharp"): "sharp is for deblur, deblur+sr is x4 in space, x2 in time; shipped models for deblur+sr: "
    "joint",
    ("upscale", "large"): "large is for sr, upscale is x4 in space, x1 in time; no model ships for it yet: train one "
    "with options/sample.yml with time_scale: 1 in network_g and both data sets and give its file with -m",
    ("interpolate", None): "no model ships for it yet: train one with options/sample.yml with scale: 1 in network_g "
    "and both data sets and give its file with -m",
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_does_not_fit_is_one_line(case, ship, command):
    ship("large", COMPACT, task="sr")
    ship("joint", COMPACT, **JOINT_SR)
    ship("sharp", ALONE, task="deblur")
    task, model = case
    code, out, err = command("in", "-o", "out", "--task", task, *(["-m", model] if model else []))
    assert (code, out, err) == (2, "", f"restore: error: task {task}: {REFUSED[case]}\n")


def test_an_unknown_task(command):
    code, _, err = command("in", "-o", "out", "--task", "sharpen")
    assert code == 2 and err.count("\n") == 1 and "'sharpen'" in err and "deblur+sr" in err
    with pytest.raises(ValueError, match="task sharpen: unknown; there is sr, "):
        load_for_task("sharpen", None)


# ---- the list


def test_the_list(ship, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    ship("a_name_that_is_long", COMPACT, licence="Apache-2.0", summary="word " * 60, **JOINT_SR)
    figures = {"set": "Vid4", "psnr": 25.5, "ssim": 0.75, "protocol": "on Y, no crop"}
    figures |= {"baseline": "input", "baseline_psnr": 20.0, "baseline_ssim": 0.5}
    ship("sharp", ALONE, licence="CC0-1.0", task="deblur", scores=[figures], speed="1 s", data="few clips")
    ship("silent", COMPACT)
    code, out, err = command("--list-models")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100 and lines == [line.rstrip() for line in lines]
    table = [re.split(r"  +", line) for line in lines[: lines.index("")]]
    assert table[0] == ["model", "task", "space", "time", "parameters", "size", "licence"]
    assert [row[0] for row in table[1:]] == ["a_name_that_is_long", "sharp", "silent"]
    assert table[2][1:4] == ["deblur", "x1", "x1"] and table[2][-2:] == ["CC0-1.0", "default"]
    assert table[3][1] == "sr" and table[3][-2:] == ["not said", "default"]
    assert "  scores  Vid4: 25.50 dB PSNR, 0.7500 SSIM, on Y, no crop (input: 20.00 dB, 0.5000)" in lines
    assert "  speed   1 s" in lines and "  data    few clips" in lines
    narrow, faults = listing(60)
    assert not faults and max(map(len, narrow.split("\n\n", 1)[1].splitlines())) <= 60


def test_the_list_goes_on_without_a_damaged_file(ship, command):
    ship("sound", COMPACT)
    path = ship("torn", ALONE)
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = command("--list-models")
    assert code == 2 and "sound" in out and "torn" not in out
    assert err.count("\n") == 1 and err.startswith(f"restore: error: {path}: damaged or altered")


def test_an_empty_folder(command, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    assert command("--list-models") == (0, "no models: give a file with -m\n", "")


# ---- making one


@pytest.fixture
def weights(tmp_path, ship) -> Path:
    """What a run writes; shipped models go into a folder of their own."""
    torch.manual_seed(1)
    path = tmp_path / "net_g_9.safetensors"
    figures = {"val": {"psnr": 31.25}}
    save_network(path, STDAN(**DEBLUR), {"type": "stdan", **DEBLUR}, iteration=9, validation=figures)
    return path


def about(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "about.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**ABOUT, **changes}.items() if value is not None}))
    return path


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_a_run_becomes_a_shipped_model(weights, tmp_path, capsys, storage):
    arguments = [str(weights), "sharp", "--about", str(about(tmp_path)), "--storage", storage]
    assert ship_weights.main(arguments) == 0
    path = checkpoint.WEIGHTS / "sharp.safetensors"
    assert sorted(file.name for file in path.parent.iterdir()) == ["SHA256SUMS", "sharp.md", "sharp.safetensors"]
    assert 2 * path.stat().st_size < 1.3 * weights.stat().st_size
    info = read_info(path)
    assert (info["iteration"], info["validation"], info["task"]) == (9, {"val": {"psnr": 31.25}}, "deblur")
    dtype = ship_weights.STORAGE[storage]
    stored, before = load_network("sharp").state_dict(), load_network(weights).state_dict()
    assert all(torch.equal(stored[key], tensor.to(dtype).float()) for key, tensor in before.items())
    page = path.with_suffix(".md").read_text()
    for part in ("# sharp", "`deblur` (the default)", "30.000 / 0.9000", "val: psnr 31.25", "- It changes nothing."):
        assert part in page
    assert ship_weights.main(["sharp", *arguments[1:]]) == 0  # described anew
    assert read_info(path) == info
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_network("sharp").state_dict().items())


BAD_SHIPMENTS = {
    "no about": (["--about", "nowhere.yml"], {}, "nowhere.yml: cannot be read; see restore/weights/stdan_s.yml"),
    "mistyped key": ([], {"licens": "CC0"}, "about.yml: unknown key 'licens'; did you mean 'licence'"),
    "missing key": ([], {"data": None}, "about.yml: data: is required and missing"),
    "unknown task": ([], {"task": "sharpen"}, "about.yml: task: 'sharpen' is none of sr"),
    "no limits": ([], {"limits": []}, "about.yml: limits: is empty"),
    "wrong task": ([], {"task": "sr"}, "net_g_9.safetensors: x1 in space, x1 in time, but task: sr is x4"),
    "half a baseline": ([], {"scores": [{**ABOUT["scores"][0], "baseline": "input"}]}, "baseline_psnr: give both"),
}


@pytest.mark.parametrize("case", BAD_SHIPMENTS)
def test_what_must_not_ship(case, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags, changes, message = BAD_SHIPMENTS[case]
    assert ship_weights.main([str(weights), "sharp", "--about", str(about(tmp_path, **changes)), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ship_weights: error: ") and err.count("\n") == 1 and message in err, err
    assert not list(checkpoint.WEIGHTS.iterdir())


def test_large_and_overflowing_weights(weights, monkeypatch):
    described_by = parse(ship_weights.About, ABOUT, "")
    with pytest.raises(ValueError, match="a model's name has letters"):
        ship_weights.ship(str(weights), "a.b", described_by, torch.float16)
    monkeypatch.setattr(ship_weights, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"MB in half precision, but no shipped file has more than 0 MB"):
        ship_weights.ship(str(weights), "sharp", described_by, torch.float16)
    network = load_network(weights)
    next(network.parameters()).data.fill_(1e5)
    with pytest.raises(ValueError, match=r"float16: embed.* would not be finite; store as bf16"):
        ship_weights.halved(network, torch.float16)
    assert not list(checkpoint.WEIGHTS.iterdir())
    with pytest.raises(CheckpointError):
        load_network("sharp")
