"""Options in the spellings of BasicSR and STDAN: the same run as in ours, or one line that says why not."""

import copy
import inspect
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import ROOT

from archs import ARCHS
from restore.data import DATASETS
from restore.dialects import DIALECTS, summary, translate
from restore.options import (
    LoaderOptions,
    LoggerOptions,
    OptimizerOptions,
    OptionError,
    Options,
    PathOptions,
    SchedulerOptions,
    TrainOptions,
    ValOptions,
    load_options,
)
from restore.schema import StrictLoader
from restore.test_sets import TEST_SETS

# The published recipe (its options file, facts in the specification) as STDAN's own code reads it.
STDAN = """
name: STTrans2_scratch
use_tb_logger: false
model: VideoSR_base
distortion: sr
scale: 4
gpu_ids: [0, 1, 2, 3, 4, 5]
datasets:
  train:
    name: Vimeo7
    mode: Vimeo7
    interval_list: [1]
    random_reverse: true
    border_mode: false
    dataroot_GT: datasets/vimeo90k_gt.lmdb
    dataroot_LQ: datasets/vimeo90k_lq4.lmdb
    cache_keys: Vimeo7_train_keys.pkl
    N_frames: 7
    use_shuffle: true
    n_workers: 3
    batch_size: 18
    GT_size: 128
    LQ_size: 32
    use_flip: true
    use_rot: true
    color: RGB
network_G: {which_model_G: STTrans2, nf: 64, nframes: 7, embed_dim: 72, HR_in: false}
path: {pretrain_model_G: ~, strict_load: true, resume_state: ~}
train:
  lr_G: !!float 2e-4
  lr_scheme: CosineAnnealingLR_Restart
  beta1: 0.9
  beta2: 0.99
  niter: 600000
  warmup_iter: -1
  T_period: [150000, 150000, 150000, 150000]
  restarts: [150000, 300000, 450000]
  restart_weights: [1, 1, 1]
  eta_min: !!float 1e-7
  pixel_criterion: cb
  pixel_weight: 1.0
  val_freq: !!float 1e3
  manual_seed: 0
logger: {print_freq: 100, save_checkpoint_freq: !!float 1e3}
"""

# What a user of BasicSR would write for the same network and data.
BASICSR = """
name: stdan_basicsr
model_type: VideoRecurrentModel
scale: 4
num_gpu: auto
manual_seed: 0
datasets:
  train:
    name: Vimeo90K
    type: Vimeo90KRecurrentDataset
    dataroot_gt: datasets/vimeo90k_gt.lmdb
    dataroot_lq: datasets/vimeo90k_lq4.lmdb
    meta_info_file: basicsr/data/meta_info/meta_info_Vimeo90K_train_GT.txt
    io_backend: {type: lmdb}
    num_frame: -1
    gt_size: 128
    interval_list: [1]
    random_reverse: true
    use_hflip: true
    use_rot: true
    flip_sequence: false
    num_worker_per_gpu: 3
    batch_size_per_gpu: 3
    dataset_enlarge_ratio: 200
    prefetch_mode: ~
    pin_memory: true
  val:
    name: Vid4
    type: VideoRecurrentTestDataset
    dataroot_gt: datasets/Vid4
    cache_data: true
    io_backend: {type: disk}
    num_frame: -1
    padding: reflection_circle
network_g: {type: STDAN}
path:
  pretrain_network_g: ~
  param_key_g: params_ema
  strict_load_g: true
  resume_state: ~
  ignore_resume_networks: ~
train:
  ema_decay: 0
  optim_g: {type: Adam, lr: !!float 2e-4, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler:
    type: CosineAnnealingRestartLR
    periods: [150000, 150000, 150000, 150000]
    restart_weights: [1, 1, 1, 1]
    eta_min: !!float 1e-7
  total_iter: 600000
  warmup_iter: -1
  pixel_opt: {type: CharbonnierLoss, loss_weight: 1.0, reduction: sum, eps: !!float 1e-6}
  perceptual_opt: ~
  gan_opt: ~
  net_d_iters: 1
network_d: ~
val:
  val_freq: !!float 5e3
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 0, test_y_channel: true, better: higher}
    rgb: {type: calculate_ssim, crop_border: 4}
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 1e3
  use_tb_logger: false
  wandb: {project: ~, resume_id: ~}
dist_params: {backend: nccl, port: 29500}
find_unused_parameters: false
"""

OURS = ROOT / "options" / "stdan_vimeo_lmdb.yml"
PER_GPU = "datasets.train.batch_size_per_gpu=3"  # 18 on 6
META = "datasets.train.meta_info_file=basicsr/data/meta_info/meta_info_Vimeo90K_train_GT.txt"


def tree_of(text: str) -> dict[str, Any]:
    return yaml.load(text, StrictLoader)


def load(folder: Path, text: str, *overrides: str) -> Options:
    path = folder / "x.yml"
    path.write_text(text)
    return load_options(path, overrides)


def test_stdans_file_is_the_published_recipe(tmp_path):
    """Written out: what it says that ours leaves to defaults."""
    said = ["datasets.train.interval_list=[1]", "network_g.channels=64", "network_g.embed_dim=72", "val.val_freq=1000"]
    ours = load_options(OURS, ["name=STTrans2_scratch", PER_GPU, *said])
    assert load(tmp_path, STDAN) == ours


def test_basicsrs_file_is_the_published_recipe(tmp_path):
    val = "datasets.val={type: TestClips, dataroot_gt: datasets/Vid4}"
    metrics = "val.metrics.{}={{type: {}, crop_border: {}, y_channel: {}}}".format
    said = ["datasets.train.interval_list=[1]", "val.val_freq=5000", META, val]
    said += [metrics("psnr", "psnr", 0, "true"), metrics("rgb", "ssim", 4, "false")]
    assert load(tmp_path, BASICSR) == load_options(OURS, ["name=stdan_basicsr", PER_GPU, *said])


def test_one_line_says_what_was_read_how(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "restore"):
        load(tmp_path, STDAN)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'x.yml'}: STDAN's older spellings are deprecated: ")
    assert "niter -> train.total_iter, lr_G -> train.optim_g.lr, " in line
    assert "; dropped: " in line and "gpu_ids (torchrun decides)" in line
    assert "\n" not in line and "BasicSR" not in line


def test_our_own_spelling_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "restore"):
        load_options(OURS, [PER_GPU])
    assert not caplog.messages


@pytest.mark.parametrize("path", sorted((ROOT / "options").glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_files_pass_unchanged(path):
    tree = tree_of(path.read_text())
    assert translate(tree) == (tree, [])


@pytest.mark.parametrize("text", [STDAN, BASICSR], ids=["STDAN", "BasicSR"])
def test_translation_is_pure_and_idempotent(text):
    tree = tree_of(text)
    before = copy.deepcopy(tree)
    once, notes = translate(tree)
    assert tree == before and notes
    assert translate(once) == (once, [])
    once["train"]["scheduler"]["periods"].append(1)
    assert tree == before, "the result shares nothing with what was given"


def test_shipped_file_for_basicsr_trains_here_too(caplog):
    """options/basicsr: for BasicSR's own script, with our data sets registered there."""
    theirs = ROOT / "options" / "basicsr" / "stdan.yml"
    if not theirs.is_file():
        pytest.skip("options/basicsr is not there")
    mine, ours = load_options(theirs), load_options(ROOT / "options" / "stdan.yml")
    assert (mine.train, mine.train_set, mine.network_g) == (ours.train, ours.train_set, ours.network_g)
    assert mine.test_sets["val"].type in TEST_SETS


@pytest.mark.parametrize("override", ["train.lr_G=1e-4", "train.optim_g.lr=1e-4"])
def test_overrides_in_either_spelling(tmp_path, override):
    for text in (STDAN, BASICSR):
        options = load(tmp_path, text, override, "num_gpu=0")
        assert options.train is not None and options.train.optim_g.lr == 1e-4
        assert options.device == "cpu"


def test_overrides_of_what_several_keys_make(tmp_path):
    options = load(tmp_path, STDAN, "network_G.nf=32", "datasets.train.batch_size=8", "gpu_ids=[0,1]")
    assert options.network_g is not None and options.network_g.arguments["channels"] == 32
    assert options.train_set.batch_size_per_gpu == 4
    with pytest.raises(OptionError, match="batch_size: is the total over gpu_ids, which are not given"):
        load(tmp_path, STDAN, "datasets.train.batch_size=8")


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (BASICSR, "datasets.train.io_backend={type: memcached}", "datasets.train.io_backend: type 'memcached' is not"),
        (BASICSR, "datasets.train.dataroot_flow=flow", "datasets.train.dataroot_flow: 'flow' is not supported"),
        (BASICSR, "datasets.train.flip_sequence=true", "datasets.train.flip_sequence: True is not supported"),
        (BASICSR, "datasets.val.num_frame=5", "datasets.val.num_frame: 5 is not supported: give window"),
        (BASICSR, "datasets.val.meta_info_file=x.txt", "datasets.val.meta_info_file: TestClips takes all clips"),
        (BASICSR, "datasets.train={type: REDS, meta_info_file: x}", "datasets.train.meta_info_file: REDS takes"),
        (BASICSR, "path.strict_load_g=false", "path.strict_load_g: False is not supported: weights fit exactly"),
        (BASICSR, "path.resume_state=1.state", "path.resume_state: '1.state' is not needed: the same command"),
        (BASICSR, "train.perceptual_opt={type: PerceptualLoss}", "train.perceptual_opt: {'type': 'PerceptualLoss'} is"),
        (BASICSR, "train.gan_opt={type: GANLoss}", "train.gan_opt: {'type': 'GANLoss'} is not supported"),
        (BASICSR, "network_d={type: UNet}", "network_d: {'type': 'UNet'} is not supported: there is no adversarial"),
        (BASICSR, "train.scheduler.restarts=[0, 5]", "train.scheduler.restarts: [0, 5] is not supported"),
        (BASICSR, "logger.wandb.project=mine", "logger.wandb: wandb is not supported; use_tb_logger: true"),
        (STDAN, "path.strict_load=false", "path.strict_load: False is not supported: weights fit exactly"),
        (STDAN, "path.resume_state=1.state", "path.resume_state: '1.state' is not needed: the same command"),
        (STDAN, "model=VideoGAN", "model: 'VideoGAN' is not supported"),
        (STDAN, "distortion=blur", "distortion: 'blur' is not supported"),
        (STDAN, "datasets.train.border_mode=true", "datasets.train.border_mode: True is not supported"),
        (STDAN, "datasets.train.use_shuffle=false", "datasets.train.use_shuffle: False is not supported"),
        (STDAN, "datasets.train.color=y", "datasets.train.color: 'y' is not supported"),
        (STDAN, "datasets.train.LQ_size=64", "datasets.train.LQ_size: 64 times scale 4 is not GT_size 128"),
        (STDAN, "network_G.HR_in=true", "network_G.HR_in: True is not supported"),
        (STDAN, "network_G.which_model_G=LunaTokis", "network_g.type: unknown type 'LunaTokis'; known: stdan"),
        (STDAN, "network_G.front_RBs=5", "network_g: unknown key 'front_RBs' for stdan"),
        (STDAN, "train.pixel_criterion=l1", "train.pixel_criterion: 'l1' is no loss here, only cb; or give"),
        (STDAN, "train.restarts=[1]", "train.restarts: [1] are not [150000, 300000, 450000]"),
        (STDAN, "train.restart_weights=[1]", "train.restart_weights: [1] needs a weight for each T_period"),
        (STDAN, "train.beta1=0.5", "train.beta1: needs beta2; or give train.optim_g.betas"),
        (STDAN, "train.beta2=0.5", "train.beta2: needs beta1; or give train.optim_g.betas"),
        (STDAN, "train.niters=5", "train: unknown key 'niters'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line(tmp_path, text, override, message):
    with pytest.raises(OptionError) as error:
        load(tmp_path, text, override)
    assert str(error.value).startswith(f"{tmp_path / 'x.yml'}: {message}"), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size: 18", "batch_size: 16", "datasets.train.batch_size: 16 does not divide among 6 gpu_ids"),
        ("mode: Vimeo7", "mode: LQGT", "datasets.train.mode: 'LQGT' is no data set here; give type"),
        ("niter: 600000", "niter: 1\n  total_iter: 2", "train.niter: train.total_iter is the same option and 2"),
        ("niter: 600000", "niter: 1\n  optim_g: 3", "train.lr_G: belongs in the section train.optim_g, but optim_g is"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, old, new, message):
    assert old in STDAN
    with pytest.raises(OptionError) as error:
        load(tmp_path, STDAN.replace(old, new))
    assert str(error.value).startswith(f"{tmp_path / 'x.yml'}: {message}"), error.value


@pytest.mark.parametrize("beside", ["total_iter: 600000", "total_iter: ~", "optim_g: ~"])
def test_the_same_value_twice_or_null_is_no_contradiction(tmp_path, beside):
    assert load(tmp_path, STDAN.replace("niter: 600000", f"niter: 600000\n  {beside}")) == load(tmp_path, STDAN)


@pytest.mark.parametrize(("count", "device"), [("0", "cpu"), ("auto", "auto"), ("8", "auto")])
def test_num_gpu(tmp_path, count, device):
    assert load(tmp_path, BASICSR.replace("num_gpu: auto", f"num_gpu: {count}")).device == device


def test_defaults_of_basicsr_are_written_out(tmp_path):
    """A key that BasicSR's file leaves out means what it means there: eps^2 = 1e-12, torch's betas, gamma 0.1."""
    text = BASICSR.replace(", eps: !!float 1e-6", "").replace(", betas: [0.9, 0.99]", "")
    start, end = text.index("    type: CosineAnnealingRestartLR"), text.index("  total_iter")
    text = text[:start] + "    {type: MultiStepRestartLR, milestones: [5], restarts: [0]}\n" + text[end:]
    options = load(tmp_path, text)
    assert options.train is not None and options.train.pixel_opt is not None
    assert options.train.pixel_opt.loss.arguments["eps"] == pytest.approx(1e-6)
    assert options.train.optim_g.betas == (0.9, 0.999)
    assert options.train.scheduler == SchedulerOptions("MultiStepLR", milestones=(5,), gamma=0.1)
    ours = load(tmp_path, text.replace("model_type: VideoRecurrentModel\n", ""))
    assert ours.train is not None and ours.train.optim_g.betas == (0.9, 0.99), "no file of BasicSR"


def test_a_multi_step_schedule_of_stdan():
    tree = {"train": {"lr_scheme": "MultiStepLR", "lr_steps": [10, 20], "lr_gamma": 0.5, "restarts": None}}
    ours, notes = translate(tree)
    assert ours == {"train": {"scheduler": {"type": "MultiStepLR", "milestones": [10, 20], "gamma": 0.5}}}
    assert "restarts (not given)" in summary(notes)


def test_no_rule_takes_a_key_of_ours():
    """Our vocabulary is what classes and signatures say; every other spelling must differ from all of it."""
    sections: dict[str, Any] = {
        "": Options, "path": PathOptions, "train": TrainOptions, "val": ValOptions, "logger": LoggerOptions,
        "train.optim_g": OptimizerOptions, "train.scheduler": SchedulerOptions,
    }  # fmt: skip
    ours = {f"{place}.{f.name}".strip(".") for place, kind in sections.items() for f in fields(kind)}
    tables: dict[str, Any] = {"network_g": ARCHS, "datasets.train": DATASETS, "datasets.!train": TEST_SETS}
    for place, table in tables.items():
        ours |= {f"{place}.{key}" for entry in table.values() for key in inspect.signature(entry).parameters}
        ours |= {f"{place}.{f.name}" for f in fields(LoaderOptions)}
    moved = {rule.old for _, rules in DIALECTS for rule in rules if rule.old != rule.new}
    moved |= {old.replace("datasets.*", which) for old in moved for which in ("datasets.train", "datasets.!train")}
    assert {"train.warmup_iter", "datasets.!train.color", "datasets.train.gt_size"} <= ours
    assert not ours & moved
