"""Other spellings of the options, translated into ours: BasicSR's, and the older ones of STDAN and Zooming Slow-Mo.

The tables at the end say all of it: a place in their files, the place in ours, and how the value changes. What has no
effect here is dropped, with the reason beside it; what would change the run and cannot be had here is an error that
names the way out. Facts: the options files of BasicSR 1.4.2, STDAN (HEAD) and Zooming Slow-Mo, and what reads them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any

from restore.losses import LOSSES
from restore.rewrite import Change, Rule, dropped, look, matches, renamed, rewrite
from restore.schema import OptionError

Note = tuple[str, Change]  # whose spelling, and what was done with it
NUMBER = (int, float)
LABELLED = (  # names in restore.action_sets.ACTION_TEST_SETS, which is far above
    *("ActionFolderTest", "ActionListTest", "SomethingSomethingTest", "KineticsTest", "MovingTexturesTest"),
)


def translate(tree: Mapping[str, Any], *, replace: bool = False) -> tuple[dict[str, Any], list[Note]]:
    """Options in our vocabulary, and what was done to get there; our own pass unchanged, without notes.

    Where an option stands in two spellings with two values it is an `OptionError`; with ``replace``, for overrides,
    the other spelling wins. Values that cannot be had here are an `OptionError`.
    """
    ours = deepcopy(dict(tree))
    notes = [(BY_BASICSR, change) for change in _write_out_defaults(ours)]
    for dialect, rules in DIALECTS:
        notes += [(dialect, change) for change in rewrite(ours, rules, replace=replace)]
    return ours, notes


def summary(notes: Sequence[Note]) -> str:
    """All notes in one line."""
    dialects = dict.fromkeys(dialect for dialect, _ in notes if dialect) or ["other spellings"]
    moved = dict.fromkeys(f"{change.old} -> {change.new}" for _, change in notes if change.new)
    dropped = dict.fromkeys(f"{change.old} ({change.why})" for _, change in notes if not change.new)
    parts = [", ".join(moved)] if moved else []
    parts += ["dropped: " + ", ".join(dropped)] if dropped else []
    return f"{' and '.join(dialects)} are deprecated: {'; '.join(parts)}"


def _write_out_defaults(tree: dict[str, Any]) -> list[Change]:
    """In a file of BasicSR a key that is missing means BasicSR's default."""
    changes = []
    for (pattern, kind), defaults in DEFAULTS.items() if "model_type" in tree else ():
        for place, _ in matches(tree, pattern):
            section = look(tree, place)
            missing = [key for key in defaults if key not in section] if look(section, ["type"]) == kind else []
            for key in missing:
                section[key] = deepcopy(defaults[key])
                changes.append(Change(f"default {key}", str(section[key])))
    return changes


def words(meanings: Mapping[str, str]) -> Callable[[Any], Any]:
    """A conversion of names; others stay."""
    return lambda value: meanings.get(value, value) if isinstance(value, str) else value


def data_set(name: Any) -> Any:
    """BasicSR's data sets, and ours as `restore.basicsr_bridge` registers them there."""
    if not isinstance(name, str):
        return name
    return DATA_SETS.get(name, name.removeprefix("RestoreTest_").removeprefix("Restore"))


def data_set_of_mode(mode: Any, kind: Any) -> Any:
    """STDAN names its data set by ``mode``; beside BasicSR's ``type`` it says nothing."""
    if kind is not None:
        return None
    if str(mode) not in MODES:
        raise OptionError(f"{mode!r} is no data set here; give type, e.g. Vimeo90K (modes: {', '.join(MODES)})")
    return MODES[str(mode)]


def per_gpu(total: Any, gpu_ids: Any) -> int:
    """A share of the total over all GPUs."""
    if not isinstance(gpu_ids, list) or not gpu_ids:
        raise OptionError("is the total over gpu_ids, which are not given; give batch_size_per_gpu")
    if not isinstance(total, NUMBER) or total % len(gpu_ids):
        raise OptionError(f"{total!r} does not divide among {len(gpu_ids)} gpu_ids; give batch_size_per_gpu")
    return int(total // len(gpu_ids))


def check_lq_size(size: Any, gt_size: Any, scale: Any) -> None:
    """The input's crop follows from the truth's."""
    scale = 4 if scale is None else scale
    if not isinstance(size, NUMBER) or not isinstance(scale, NUMBER) or size * scale != gt_size:
        raise OptionError(f"{size!r} times scale {scale} is not GT_size {gt_size!r}; give gt_size alone")


def check_restarts(restarts: Any, periods: Any) -> Any:
    """A restart stands after each period but the last."""
    numbers = isinstance(periods, list) and all(isinstance(period, NUMBER) for period in periods)
    ends = list(accumulate(periods))[:-1] if numbers else []
    if restarts != ends:
        raise OptionError(f"{restarts!r} are not {ends}, where T_period {periods!r} ends; give train.scheduler.periods")
    return periods


def all_weights(weights: Any, periods: Any) -> Any:
    """Theirs are of the restarts; the first period has weight 1."""
    if isinstance(weights, list) and isinstance(periods, list) and len(weights) == len(periods) - 1:
        return [1, *weights]
    raise OptionError(f"{weights!r} needs a weight for each T_period {periods!r} but the first")


def both_betas(beta1: Any, beta2: Any) -> list[Any]:
    """Two keys, one list."""
    if beta2 is None:
        raise OptionError("needs beta2; or give train.optim_g.betas")
    return [beta1, beta2]


def check_beta2(beta2: Any, betas: Any) -> Any:
    """It has come with beta1."""
    if not isinstance(betas, list) or betas[1:] != [beta2]:
        raise OptionError("needs beta1; or give train.optim_g.betas")
    return betas


def charbonnier(name: Any) -> dict[str, Any]:
    """STDAN's Charbonnier sum, the square root of d^2 + 1e-6."""
    if name != "cb":
        raise OptionError(f"{name!r} is no loss here, only cb; or give train.pixel_opt, type {' or '.join(LOSSES)}")
    return {"type": "CharbonnierLoss", "reduction": "sum", "eps": 1e-3}


def root(eps: Any, kind: Any, model_type: Any) -> Any:
    """BasicSR adds eps to the square, we eps^2; its files are those that have a model_type."""
    known = kind == "CharbonnierLoss" and isinstance(eps, NUMBER) and eps >= 0
    return math.sqrt(eps) if model_type is not None and known else eps


def cpu_only(count: Any) -> str | None:
    """BasicSR's way to name the CPU."""
    return "cpu" if count == 0 else None


def known_backend(backend: Any) -> None:
    """Files and LMDB databases are told apart by their paths."""
    kind = look(backend, ["type"])
    if kind not in ("disk", "lmdb"):
        raise OptionError(f"type {kind!r} is not supported; folders and *.lmdb are recognised by dataroot_gt")


def frames_of_views(frames: Any, kind: Any) -> Any:
    """Sets of labelled clips have it; others windows."""
    if kind in LABELLED:
        return frames
    if frames not in (-1, 7):
        raise OptionError(f"{frames!r} is not supported: give window")
    return None


def septuplet(frames: Any, kind: Any) -> Any:
    """BasicSR's -1: all there are."""
    return 7 if frames == -1 and kind == "Vimeo90K" else frames


def listing(path: Any, kind: Any) -> Any:
    """Lists that say no more than the tree does are not needed."""
    if kind == "REDS":
        if path is not None and not str(path).endswith("meta_info_REDS_GT.txt"):
            raise OptionError("REDS takes all clips but those of val_partition; remove it, or use a ClipFolder")
        return None
    if kind in ("TestClips", "folder") and path is not None:
        raise OptionError(f"{kind} takes all clips below dataroot_gt, or those named, as in clips: [calendar, city]")
    return path


def no_wandb(section: Any) -> None:
    """Without a project it does nothing."""
    if look(section, ["project"]) is not None:
        raise OptionError("wandb is not supported; use_tb_logger: true writes for TensorBoard")


def empty_for_null(section: Any) -> Any:
    """BasicSR's way to say none."""
    return {} if section is None else section


MODES = {"Vimeo7": "Vimeo90K", "Vimeo90K": "Vimeo90K", "REDS": "REDS"}
NETWORKS = {"STDAN": "stdan", "STTrans2": "stdan"}  # the second is STDAN's class in its own repository
DATA_SETS = {
    "Vimeo90KDataset": "Vimeo90K",
    "Vimeo90KRecurrentDataset": "Vimeo90K",
    "REDSDataset": "REDS",
    "REDSRecurrentDataset": "REDS",
    "VideoTestDataset": "TestClips",
    "VideoRecurrentTestDataset": "TestClips",
}
SCHEDULERS = {
    "CosineAnnealingLR_Restart": "CosineAnnealingRestartLR",
    "MultiStepLR_Restart": "MultiStepLR",
    "MultiStepRestartLR": "MultiStepLR",
}
STRICT = "is not supported: weights fit exactly or are refused; remove it"
RESUME = "is not needed: the same command continues a run; weights to start from are path.pretrain_network_g"
NO_GAN = "is not supported: there is no adversarial training; remove it"

BOTH = [
    *renamed({"datasets.*.use_flip": "datasets.*.use_hflip"}),
    Rule("datasets.*.mode", "datasets.*.type", data_set_of_mode, ("datasets.*.type",), "type tells"),
    dropped("datasets.*.name", "the section's name tells"),
    dropped("datasets.*.use_shuffle", "always", True, otherwise="is not supported: samples are drawn at random"),
    dropped("path.strict_load", "always strict", True, otherwise=STRICT),
    dropped("path.resume_state", "the same command continues", otherwise=RESUME),
]

BASICSR = [
    *renamed({"path.pretrain_model_g": "path.pretrain_network_g"}),
    # the same by another name, or in another unit
    Rule("num_gpu", "device", cpu_only, why="torchrun decides"),
    Rule("network_g.type", "network_g.type", words(NETWORKS)),
    Rule("datasets.*.type", "datasets.*.type", data_set),
    Rule("datasets.train.num_frame", "datasets.train.num_frame", septuplet, ("datasets.train.type",)),
    Rule("datasets.*.meta_info_file", "datasets.*.meta_info_file", listing, ("datasets.*.type",), "the tree tells"),
    Rule("train.scheduler.type", "train.scheduler.type", words(SCHEDULERS)),
    Rule("train.pixel_opt.eps", "train.pixel_opt.eps", root, ("train.pixel_opt.type", "model_type")),
    Rule("val.metrics", "val.metrics", empty_for_null),
    Rule("val.metrics.*.type", "val.metrics.*.type", words({"calculate_psnr": "psnr", "calculate_ssim": "ssim"})),
    *renamed({"val.metrics.*.test_y_channel": "val.metrics.*.y_channel"}),
    dropped("val.metrics.*.better", "the metric tells"),
    # how samples are read
    Rule("datasets.*.io_backend", "", known_backend, why="the path tells"),
    dropped("datasets.*.dataroot_flow", "no flow is read", otherwise="is not supported: no flow is read; remove it"),
    dropped("datasets.*.flip_sequence", "off", False, otherwise="is not supported; random_reverse: true is near"),
    dropped("datasets.*.test_mode", "off", False, otherwise="is not supported; remove it"),
    dropped("datasets.train.dataset_enlarge_ratio", "there are no epochs"),
    dropped("datasets.*.prefetch_mode", "workers read ahead"),
    dropped("datasets.*.num_prefetch_queue", "workers read ahead"),
    dropped("datasets.*.pin_memory", "always with CUDA"),
    dropped("datasets.*.persistent_workers", "workers stay"),
    Rule(
        "datasets.!train.num_frame", "datasets.!train.num_frame", frames_of_views, ("datasets.!train.type",),
        "window tells",
    ),
    dropped("datasets.!train.padding", "windows overlap"),
    dropped("datasets.!train.cache_data", "frames are read once"),
    # weights
    dropped("path.param_key_g", "params_ema where there is one"),
    dropped("path.strict_load_g", "always strict", True, otherwise=STRICT),
    dropped("path.ignore_resume_networks", "the same command continues"),
    # losses with a second network
    dropped("network_d", "no adversarial training", otherwise=NO_GAN),
    dropped("path.pretrain_network_d", "no adversarial training", otherwise=NO_GAN),
    dropped("path.param_key_d", "no adversarial training"),
    dropped("path.strict_load_d", "no adversarial training"),
    dropped("train.optim_d", "no adversarial training", otherwise=NO_GAN),
    dropped("train.gan_opt", "no adversarial training", otherwise=NO_GAN),
    dropped("train.net_d_iters", "no adversarial training"),
    dropped("train.net_d_init_iters", "no adversarial training"),
    dropped("train.perceptual_opt", "off", otherwise=f"is not supported: losses are {', '.join(LOSSES)}"),
    # the rest
    dropped("train.scheduler.restarts", "off", [0], otherwise="is not supported; CosineAnnealingRestartLR restarts"),
    dropped("val.suffix", "images are numbered"),
    dropped("val.pbar", "no bar"),
    Rule("logger.wandb", "", no_wandb, why="no project"),
    dropped("dist_params", "torchrun decides"),
    dropped("model_type", "one loop trains all"),
]

STDAN = [
    *renamed(
        {
            "use_tb_logger": "logger.use_tb_logger",
            "datasets.*.dataroot_GT": "datasets.*.dataroot_gt",
            "datasets.*.dataroot_LQ": "datasets.*.dataroot_lq",
            "datasets.train.N_frames": "datasets.train.num_frame",
            "datasets.train.GT_size": "datasets.train.gt_size",
            "datasets.train.n_workers": "datasets.train.num_worker_per_gpu",
            "network_G.nf": "network_g.channels",
            "network_G.groups": "network_g.deform_groups",
            "path.pretrain_model_G": "path.pretrain_network_g",
            "train.niter": "train.total_iter",
            "train.lr_G": "train.optim_g.lr",
            "train.weight_decay_G": "train.optim_g.weight_decay",
            "train.T_period": "train.scheduler.periods",
            "train.eta_min": "train.scheduler.eta_min",
            "train.lr_steps": "train.scheduler.milestones",
            "train.lr_gamma": "train.scheduler.gamma",
            "train.pixel_weight": "train.pixel_opt.loss_weight",
            "train.val_freq": "val.val_freq",
            "train.manual_seed": "manual_seed",
        }
    ),
    # several keys that make one, or another value
    Rule("network_G.which_model_G", "network_g.type", words(NETWORKS)),
    Rule("datasets.train.batch_size", "datasets.train.batch_size_per_gpu", per_gpu, ("gpu_ids",)),
    Rule("datasets.train.LQ_size", "", check_lq_size, ("datasets.train.gt_size", "scale"), "gt_size / scale"),
    Rule("train.beta1", "train.optim_g.betas", both_betas, ("train.beta2",)),
    Rule("train.beta2", "train.optim_g.betas", check_beta2, ("train.optim_g.betas",)),
    Rule("train.lr_scheme", "train.scheduler.type", words(SCHEDULERS)),
    Rule("train.restarts", "train.scheduler.periods", check_restarts, ("train.scheduler.periods",)),
    Rule("train.restart_weights", "train.scheduler.restart_weights", all_weights, ("train.scheduler.periods",)),
    Rule("train.pixel_criterion", "train.pixel_opt", charbonnier),
    # what has one value here
    dropped("model", "one loop trains all", "VideoSR_base", otherwise="is not supported, only VideoSR_base"),
    dropped("distortion", "sr", "sr", otherwise="is not supported, only sr; other inputs by dataroot_lq"),
    dropped("gpu_ids", "torchrun decides"),
    dropped("datasets.*.cache_keys", "the database tells"),
    dropped("datasets.*.border_mode", "off", False, otherwise="is not supported: stretches of frames are uniform"),
    dropped("datasets.train.color", "RGB", "RGB", otherwise="is not supported: frames are RGB"),
    dropped("network_G.nframes", "any number of frames"),
    dropped("network_G.HR_in", "off", False, otherwise="is not supported: inputs are of low resolution"),
    *renamed({"network_G": "network_g"}),
]

BY_BASICSR, BY_STDAN = "BasicSR's spellings", "STDAN's older spellings"
DIALECTS: tuple[tuple[str, list[Rule]], ...] = (("", BOTH), (BY_BASICSR, BASICSR), (BY_STDAN, STDAN))

# What a missing key means in a file of BasicSR, where our default differs: (section, its type): keys
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("datasets.train", "REDSRecurrentDataset"): {"random_reverse": False},
    ("train.optim_g", "Adam"): {"betas": [0.9, 0.999]},
    ("train.optim_g", "AdamW"): {"betas": [0.9, 0.999], "weight_decay": 0.01},
    ("train.scheduler", "MultiStepRestartLR"): {"gamma": 0.1},
    ("train.pixel_opt", "CharbonnierLoss"): {"eps": 1e-12},
    ("val.metrics.*", "calculate_psnr"): {"test_y_channel": False},
    ("val.metrics.*", "calculate_ssim"): {"test_y_channel": False},
}
