"""The training loop: step, log, validate, save; running the same command again continues exactly.

One step reads `restore.data`, runs the network under autocast, takes the losses in float32, and steps optimiser and
moving average. Nothing random depends on anything but seed and iteration, so a continued run repeats what an
uninterrupted one would have done.
"""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from archs import ARCHS, VideoNet
from restore.checkpoint import load_network, load_state, save_network
from restore.data import DATASETS, ClipCrops, training_batches
from restore.device import autocast, pick_device
from restore.evaluation import TEST_SETS, ClipScore, evaluate, mean_over_clips, network_restorer
from restore.experiment import Experiment
from restore.log import append_json, console_logger, duration
from restore.losses import LOSSES
from restore.memory import keep_freed_memory, peak_memory_mb
from restore.options import (
    OptimizerOptions,
    OptionError,
    Options,
    SchedulerOptions,
    TrainOptions,
    check_arguments,
    construct,
)

log = logging.getLogger("restore")


@dataclass
class Run:
    """What a training run changes as it goes on."""

    network: VideoNet
    average: VideoNet | None  # exponential moving average of the weights
    optimizer: Optimizer
    iteration: int = 0

    def state(self) -> dict[str, Any]:
        """All of it, for `Experiment.save_state`."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.iteration = state["iteration"]

    @property
    def best_network(self) -> VideoNet:
        """The weights to validate and ship: the average where there is one."""
        return self.average or self.network


def train(options: Options) -> None:
    """Train as ``options`` say until total_iter, continuing what the experiment's folder holds."""
    if options.train is None or options.network_g is None:
        raise OptionError("training needs the sections 'train' and 'network_g'")
    check_arguments(DATASETS, options.train_set.dataset, "datasets.train")
    for name, section in options.test_sets.items():
        check_arguments(TEST_SETS, section, f"datasets.{name}")
    check_arguments(LOSSES, options.train.pixel_opt, "train.pixel_opt")
    device = pick_device(options.device)
    keep_freed_memory()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    experiment = Experiment(Path(options.path.experiments) / options.name)
    experiment.claim(options)
    console_logger(file=experiment.folder / "train.log")
    run = begin(options, device)
    state = experiment.latest_state(device)
    if state is not None:
        run.restore(state)
        log.info("continuing at iteration %d", run.iteration)
    log.info("%s: %d parameters on %s", options.network_g.type, count_parameters(run.network), device)
    started = time.monotonic()
    samples = construct(DATASETS, options.train_set.dataset, "datasets.train")
    log.info("%d clips read in %.0f s", len(samples.clips), time.monotonic() - started)
    _loop(options, options.train, run, samples, experiment, device)


def begin(options: Options, device: torch.device) -> Run:
    """Network, moving average and optimiser of iteration 0."""
    assert options.network_g is not None and options.train is not None
    torch.manual_seed(options.manual_seed)
    network = construct(ARCHS, options.network_g, "network_g")
    if network.scale != options.scale:
        raise OptionError(f"scale: {options.scale}, but {options.network_g.type} has scale {network.scale}")
    if options.path.pretrain_network_g:
        weights = load_network(options.path.pretrain_network_g).state_dict()
        load_state(network, weights, options.path.pretrain_network_g)
    layout = torch.channels_last if options.train.channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    average = deepcopy(network).requires_grad_(False) if options.train.ema_decay else None
    return Run(network, average, make_optimizer(network, options.train.optim_g))


def make_optimizer(network: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Adam or AdamW over all parameters."""
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[options.type]
    return kind(
        network.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )


def step(
    network: nn.Module,
    batch: Mapping[str, Tensor],
    loss: nn.Module,
    optimizer: Optimizer,
    *,
    autocast: AbstractContextManager[Any],
    grad_clip: float | None,
) -> dict[str, float]:
    """One iteration: forward, backward, clip, optimiser; the loss and the gradient's norm."""
    with autocast:
        restored = network(batch["lq"])
    value = loss(restored, batch["gt"])
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip or math.inf)
    if not torch.isfinite(value):
        raise FloatingPointError(f"loss is {value.item()}")
    optimizer.step()
    return {"loss": value.item(), "grad_norm": norm.item()}


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network, parameter by parameter; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def learning_rate(iteration: int, base: float, scheduler: SchedulerOptions, warmup_iter: int = -1) -> float:
    """The rate of ``iteration`` (the first is 1) in closed form.

    Cosine with hard restarts as STDAN's recipe: with P the current period, ``eta_min + (w*base - eta_min) (1 + cos(pi
    (it mod P) / P)) / 2``, eta_min at and after the end. A warm-up of n iterations rises linearly to the base rate.
    """
    if 0 < iteration <= warmup_iter:
        return base * iteration / warmup_iter
    if scheduler.type == "MultiStepLR":
        return base * scheduler.gamma ** sum(iteration >= milestone for milestone in scheduler.milestones)
    if scheduler.type == "Constant":
        return base
    begin_ = 0
    for i, period in enumerate(scheduler.periods):
        if iteration < begin_ + period:
            weight = scheduler.restart_weights[i] if scheduler.restart_weights else 1.0
            wave = (1 + math.cos(math.pi * (iteration - begin_) / period)) / 2
            return scheduler.eta_min + (weight * base - scheduler.eta_min) * wave
        begin_ += period
    return scheduler.eta_min


def count_parameters(network: nn.Module) -> int:
    """Trainable and frozen parameters together."""
    return sum(parameter.numel() for parameter in network.parameters())


def _loop(
    options: Options, recipe: TrainOptions, run: Run, samples: ClipCrops, experiment: Experiment, device: torch.device
) -> None:
    loader = options.train_set
    batches = training_batches(
        samples,
        first=run.iteration,
        last=recipe.total_iter,
        batch=loader.batch_size_per_gpu,
        workers=loader.num_worker_per_gpu,
        seed=options.manual_seed,
    )
    loss = construct(LOSSES, recipe.pixel_opt, "train.pixel_opt")
    meter = Meter(options, experiment)
    run.network.train()
    for batch in batches:
        run.iteration += 1
        meter.waited()
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.iteration, recipe.optim_g.lr, recipe.scheduler, recipe.warmup_iter)
        on_device = {key: batch[key].to(device, non_blocking=True) for key in ("lq", "gt")}
        try:
            terms = step(
                run.network,
                on_device,
                loss,
                run.optimizer,
                autocast=autocast(device, recipe.precision),
                grad_clip=recipe.grad_clip,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"iteration {run.iteration}: {error} on {', '.join(batch['name'])}") from error
        if run.average is not None:
            update_average(run.average, run.network, min(recipe.ema_decay, run.iteration / (run.iteration + 10)))
        meter.stepped(run, terms, recipe.total_iter)
        _save_and_validate(options, run, experiment, recipe.total_iter)


def _save_and_validate(options: Options, run: Run, experiment: Experiment, total: int) -> None:
    assert options.network_g is not None
    last = run.iteration == total
    figures: dict[str, dict[str, float]] = {}
    if options.test_sets and options.val.val_freq and (last or run.iteration % options.val.val_freq == 0):
        figures = validate(options, run, experiment)
    if last or run.iteration % options.logger.save_checkpoint_freq == 0:
        path = experiment.models / f"net_g_{run.iteration}.safetensors"
        description = options.network_g.describe()
        save_network(path, run.best_network, description, iteration=run.iteration, validation=figures)
        experiment.save_state(run.iteration, run.state(), options.logger.keep_checkpoints)


def validate(options: Options, run: Run, experiment: Experiment) -> dict[str, dict[str, float]]:
    """Figures of the current weights on every validation set, by the code and protocol of `test.py`."""
    network = run.best_network
    device = next(network.parameters()).device
    restorer = network_restorer(network.eval(), device, tile=options.val.tile, precision=options.val.precision)
    figures = {}
    for name, section in options.test_sets.items():
        clips = construct(TEST_SETS, section, f"datasets.{name}")
        images = experiment.folder / "visualization" / str(run.iteration) if options.val.save_img else None
        scores: list[ClipScore] = []
        for clip, result in evaluate(clips, {"network": restorer}, scale=options.scale, images=images):
            if isinstance(result, ValueError):
                log.warning("%s: %s: %s", name, clip, result)
            else:
                scores += result
        figures[name] = {"psnr_y": mean_over_clips(scores, "psnr"), "ssim_y": mean_over_clips(scores, "ssim")}
        append_json(experiment.records, {"iteration": run.iteration, "validation": name, **figures[name]})
        log.info("it %d  %s: PSNR-Y %.3f dB  SSIM-Y %.4f", run.iteration, name, *figures[name].values())
    run.network.train()
    return figures


class Meter:
    """Averages between two lines of the log, and writes them."""

    def __init__(self, options: Options, experiment: Experiment) -> None:
        self.options, self.experiment = options, experiment
        self.batch = options.train_set.batch_size_per_gpu
        self._begin()

    def _begin(self) -> None:
        self.count, self.waiting, self.sums = 0, 0.0, dict[str, float]()
        self.started = self.mark = time.monotonic()

    def waited(self) -> None:
        """A batch has arrived: the time since the last step was spent waiting for it."""
        self.waiting += time.monotonic() - self.mark

    def stepped(self, run: Run, terms: Mapping[str, float], total: int) -> None:
        """A step is done; every print_freq steps a line is written."""
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        if run.iteration % self.options.logger.print_freq == 0 or run.iteration == total:
            self._write(run, total)
            self._begin()
        self.mark = time.monotonic()

    def _write(self, run: Run, total: int) -> None:
        seconds = time.monotonic() - self.started
        means = {key: value / self.count for key, value in self.sums.items()}
        rate = self.count / seconds
        record = {
            "iteration": run.iteration,
            "lr": run.optimizer.param_groups[0]["lr"],
            **means,
            "samples_per_s": round(rate * self.batch, 3),
            "data_share": round(self.waiting / seconds, 4),
            "memory_mb": peak_memory_mb(),
        }
        append_json(self.experiment.records, record)
        log.info(
            "it %d/%d  lr %.2e  loss %.5g  grad %.3g  %.2f samples/s  data %.0f %%  %d MB  eta %s",
            *(run.iteration, total, record["lr"], means["loss"], means["grad_norm"], rate * self.batch),
            *(100 * self.waiting / seconds, record["memory_mb"], duration((total - run.iteration) / rate)),
        )
