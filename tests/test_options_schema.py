"""The JSON Schema of options: up to date, and of one mind with `load_options`."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny import ROOT

from archs import ARCHS, CLASSIFIERS
from restore import options_schema
from restore.action_sets import ACTION_SETS, ACTION_TEST_SETS
from restore.data import DATASETS
from restore.options import OptionError, check_arguments, load_options
from restore.options_schema import json_schema, main
from restore.schema import StrictLoader, override
from restore.test_sets import TEST_SETS

SHIPPED = sorted((ROOT / "options").glob("*.yml"))
FILE = ROOT / "options" / "sample.yml"  # has every section


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def tree_of(path: Path, *overrides: str) -> dict[str, Any]:
    tree = yaml.load(path.read_text(), StrictLoader)
    for assignment in overrides:
        override(tree, assignment)
    return tree


def test_shipped_schema_is_up_to_date():
    assert main(["--check"]) == 0, "run python -m restore.options_schema"


def test_what_is_out_of_date_is_one_line(monkeypatch, tmp_path, capsys):
    file = tmp_path / "schema.json"
    monkeypatch.setattr(options_schema, "FILE", file)
    assert main(["--check"]) == 1 and capsys.readouterr().err.count("\n") == 1
    assert main([]) == 0 and main(["--check"]) == 0
    assert json.loads(file.read_text()) == json_schema()
    assert max(map(len, file.read_text().splitlines())) < 1000, "lines that a diff can show"
    file.write_text(file.read_text().replace("integer", "number", 1))
    assert main(["--check"]) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_validate_and_name_the_schema(validator, path):
    assert not list(validator.iter_errors(tree_of(path)))
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize(
    "assignment",
    [
        "train.optim_g.lr=1",
        "train.total_iter=5e3",
        "train.pixel_opt.ramp=[0, 10]",
        "train.pixel_opt.ramp=~",
        "train.losses.second={type: CharbonnierLoss, ramp: [0, 10]}",
        "train.param_groups=[{match: interpolate, lr_mult: 0.1}]",
        "train.grad_clip=~",
        "train.optim_g={type: SGD, momentum: 0.8, nesterov: false}",
        "network_g={type: atm_resnet, classes: 4, depth: [1, 1, 1, 1]}",
        "network_g={type: dtf_net, depth: 101, predictor: resample}",
        "network_g.skip=~",
        "network_g.upsample_width=8",
        "val.metrics.psnr={type: psnr, crop_border: 4}",
        "datasets.val={type: TestClips, dataroot_gt: x, degradation: {type: bd, sigma: 1.5}}",
        "datasets.train={type: Mixed, sets: [{type: REDS, dataroot_gt: x, weight: 2}], batch_size_per_gpu: 2}",
    ],
)
def test_both_take(validator, assignment):
    load_options(FILE, [assignment])
    assert not list(validator.iter_errors(tree_of(FILE, assignment)))


@pytest.mark.parametrize(
    "assignment",
    [
        "nam=x",
        "name=3",
        "scale=0",
        "manual_seed=true",
        "network_g.type=stdann",
        "network_g.chanels=8",
        "network_g={channels: 8}",
        "train={optim_g: {lr: 1e-4}}",
        "train.total_iter=0",
        "train.total_iter=many",
        "train.total_iter=0.5",
        "train.ema_decay=2",
        "train.precision=fp8",
        "train.optim_g.betas=[0.9]",
        "train.optim_g.betas=0.9",
        "train.optim_g.type=RMSprop",
        "train.param_groups=[{lr_mult: 1}]",
        "train.param_groups=[{match: x, lr_mul: 1}]",
        "train.pixel_opt={loss_weight: 1}",
        "train.pixel_opt.ramp=[0]",
        "train.losses.second=3",
        "val.tile=4",
        "val.val_freqs=5",
        "val.metrics.psnr={crop_border: 4}",
        "logger.keep_checkpoints=1",
        "datasets.train={clips: 6}",
        "datasets.train.batch_size_per_gpu=0",
        "datasets.val={dataroot_gt: x}",
        "datasets.val.num_worker_per_gpu=-1",
        "networks=stdan_s",
    ],
)
def test_both_refuse(validator, assignment):
    with pytest.raises(OptionError):
        load_options(FILE, [assignment])
    assert list(validator.iter_errors(tree_of(FILE, assignment)))


@pytest.mark.parametrize(
    "assignment",
    [
        "datasets.train.type=SampleClip",
        "datasets.train.gt_sizes=64",
        "datasets.train={type: ClipFolder}",
        "datasets.val.type=SampleClips",
        "datasets.val.dataroot_gt=x",
        "datasets.val={type: TestClips}",
    ],
)
def test_both_refuse_what_no_data_set_takes(validator, assignment):
    """Sections of data sets are checked where they are used."""
    options = load_options(FILE, [assignment])
    with pytest.raises(OptionError):
        check_arguments(DATASETS, options.train_set.dataset, "datasets.train")
        check_arguments(TEST_SETS, options.test_sets["val"], "datasets.val")
    assert list(validator.iter_errors(tree_of(FILE, assignment)))


@pytest.mark.parametrize(
    "assignment",
    [
        "datasets.train.gt_size=large",
        "datasets.train.degradation={type: bdd}",
        "datasets.train={type: Mixed, sets: [{type: Mixed}]}",
        "network_g.upsampler=heavy",
        "train.pixel_opt.reduction=max",
        "val.metrics.psnr={type: psnrs}",
    ],
)
def test_the_schema_knows_values_that_constructors_refuse(validator, assignment):
    assert list(validator.iter_errors(tree_of(FILE, assignment)))


def test_every_type_is_described():
    schema = json_schema()["definitions"]
    tables = {
        "network": {**ARCHS, **CLASSIFIERS},
        "training_set": {**DATASETS, **ACTION_SETS},
        "test_set": {**TEST_SETS, **ACTION_TEST_SETS},
    }
    for kind, table in tables.items():
        assert schema[kind]["properties"]["type"]["enum"] == list(table)
        assert all(branch["then"]["description"].endswith((".", ":")) for branch in schema[kind]["allOf"])


def test_descriptions_are_comments_and_sentences():
    schema = json_schema()
    assert schema["properties"]["device"]["description"] == "auto | cpu | cuda | cuda:1 | mps"
    branches = [branch["then"]["properties"] for branch in schema["definitions"]["training_set"]["allOf"]]
    keys = next(branch for branch in branches if branch["type"] == {"const": "ClipFolder"})
    assert keys["exclude"]["description"] == "``exclude`` leaves clips out by name, for validation."
    assert keys["gt_size"]["description"].startswith("Crops of ``gt_size`` are uniform in position")
