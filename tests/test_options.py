"""Options: strict, typed, with errors that name file, place and way out."""

from pathlib import Path

import pytest

from restore.options import OptionError, as_dict, load_options

MINIMAL = """
name: run
network_g: {type: stdan, channels: 16}
datasets:
  train: {type: SampleClips, batch_size_per_gpu: 2}
train: {total_iter: 10, pixel_opt: {type: CharbonnierLoss}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yml"
    path.write_text(text)
    return path


def test_every_shipped_file_loads():
    for path in sorted((Path(__file__).parents[1] / "options").glob("*.yml")):
        options = load_options(path)
        assert options.name


def test_values_and_defaults(tmp_path):
    options = load_options(write(tmp_path, MINIMAL))
    assert options.train is not None and options.train.total_iter == 10
    assert options.train.optim_g.lr == 2e-4
    assert options.train_set.batch_size_per_gpu == 2
    assert options.train_set.dataset.type == "SampleClips" and not options.train_set.dataset.arguments
    assert options.network_g is not None and options.network_g.describe() == {"type": "stdan", "channels": 16}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1.0e-4", "0.0001"])
def test_scientific_numbers_are_numbers(tmp_path, text):
    options = load_options(write(tmp_path, MINIMAL), [f"train.optim_g.lr={text}", "train.total_iter=5e3"])
    assert options.train is not None
    assert options.train.optim_g.lr == 1e-4
    assert options.train.total_iter == 5000 and isinstance(options.train.total_iter, int)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_iters=5", "train: unknown key 'total_iters'; did you mean 'total_iter'?"),
        ("network_g.chanels=8", "network_g: unknown key 'chanels' for stdan; did you mean 'channels'?"),
        ("network_g.type=stdann", "network_g.type: unknown type 'stdann'; did you mean 'stdan'?"),
        ("train.total_iter=0", "train.total_iter: 0 must be at least 1"),
        ("train.ema_decay=2", "train.ema_decay: 2.0 must be within 0..0.999999"),
        ("train.precision=fp8", "train.precision: 'fp8' is none of fp32, bf16"),
        ("train.total_iter=many", "train.total_iter: 'many' is not a whole number"),
        ("manual_seed=true", "manual_seed: True is not a whole number"),
        ("train.optim_g.betas=[0.9]", "train.optim_g.betas: expected 2 values, not 1"),
        ("train.scheduler={type: CosineAnnealingRestartLR}", "train.scheduler.periods: CosineAnnealingRestartLR needs"),
        ("name=a/b", "name: 'a/b' becomes a folder"),
        ("train", "--set train: expected key=value"),
        ("datasets.val={dataroot_gt: x}", "datasets.val: expected a section with the key 'type'"),
    ],
)
def test_errors_name_place_and_way_out(tmp_path, override, message):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(OptionError) as error:
        load_options(path, [override])
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_duplicate_keys_are_errors(tmp_path):
    with pytest.raises(OptionError, match="line 8: the key 'name' appears twice"):
        load_options(write(tmp_path, MINIMAL + "\nname: again\n"))


@pytest.mark.parametrize("text", ["", "- a\n", "name: [", "name: a\nnetwork_g: 3\n"])
def test_files_that_are_no_options(tmp_path, text):
    with pytest.raises(OptionError) as error:
        load_options(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_key(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        load_options(tmp_path / "none.yml")
    with pytest.raises(OptionError, match=r"train\.total_iter: is required"):
        load_options(write(tmp_path, MINIMAL.replace("total_iter: 10, ", "")))


def test_resolved_options_are_plain_values(tmp_path):
    tree = as_dict(load_options(write(tmp_path, MINIMAL)))
    assert tree["network_g"] == {"type": "stdan", "channels": 16}
    assert tree["train"]["optim_g"]["betas"] == [0.9, 0.99]
