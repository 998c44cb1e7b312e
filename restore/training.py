"""The training loop: step, log, validate, save; running the same command again continues exactly.

One step reads `restore.data`, runs the network under autocast, takes the losses in float32, and steps optimiser and
moving average (`restore.run`). Nothing random depends on anything but seed, iteration and process, so a continued run
repeats what an uninterrupted one would have done.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archs import VideoNet
from restore import distributed
from restore.checkpoint import save_network
from restore.cost import count_parameters
from restore.data import DATASETS, ClipCrops, SampleNumbers, training_batches
from restore.device import autocast, pick_device
from restore.evaluation import TEST_SETS, ClipScore, evaluate, mean_over_clips, network_restorer
from restore.experiment import Experiment
from restore.log import console_logger
from restore.losses import LOSSES
from restore.memory import keep_freed_memory
from restore.options import OptionError, Options, TrainOptions, check_arguments, construct
from restore.progress import Meter, summary_writer
from restore.run import Run, begin, clip_gradients
from restore.schedule import ramp

log = logging.getLogger("restore")

Batch = Mapping[str, Any]  # lq (B, T, 3, h, w), gt (B, U, 3, H, W), name


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""


def train(options: Options) -> None:
    """Train as ``options`` say until total_iter, continuing what the experiment's folder holds.

    Raises ValueError for bad options or data, FloatingPointError for a loss that is not finite, `Interrupted` when
    asked to stop.
    """
    recipe = check(options)
    keep_freed_memory()
    use_threads(options)
    experiment = Experiment(Path(options.path.experiments) / options.name)
    run = begin(options, pick_device(options.device))
    samples = construct(DATASETS, options.train_set.dataset, "datasets.train")
    if distributed.is_main():
        experiment.claim(options)
        console_logger(file=experiment.folder / "train.log")
    distributed.wait()
    state = experiment.latest_state(run.device)
    if state is not None:
        run.restore(state)
        log.info("continuing at iteration %d", run.iteration)
    log.info("%s: %d parameters on %s", type(run.network).__name__, count_parameters(run.network), run.device)
    Loop(options, recipe, run, samples, experiment).go_on()


def check(options: Options) -> TrainOptions:
    """Everything that can be refused before any work; returns the section ``train``."""
    if options.train is None or options.network_g is None:
        raise OptionError("training needs the sections 'train' and 'network_g'")
    check_arguments(DATASETS, options.train_set.dataset, "datasets.train")
    for name, section in options.test_sets.items():
        check_arguments(TEST_SETS, section, f"datasets.{name}")
    for name, term in options.train.terms.items():
        check_arguments(LOSSES, term.loss, f"train.losses.{name}")
    if options.logger.use_tb_logger:
        summary_writer()
    return options.train


def use_threads(options: Options) -> None:
    """As many threads of the CPU as the options say."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)


class Loop:
    """One run's iterations."""

    def __init__(
        self, options: Options, recipe: TrainOptions, run: Run, samples: ClipCrops, experiment: Experiment
    ) -> None:
        self.options, self.recipe, self.run = options, recipe, run
        self.samples, self.experiment = samples, experiment
        self.losses = {
            name: construct(LOSSES, term.loss, f"train.losses.{name}") for name, term in recipe.terms.items()
        }
        self.meter = Meter(options, experiment, recipe.total_iter)
        self.skipped: set[int] = set()  # iterations whose batch has made the loss infinite

    def go_on(self) -> None:
        """Run from where the state stands to total_iter."""
        with stop_requests() as stop:
            while self.run.iteration < self.recipe.total_iter:
                try:
                    self._iterate(stop)
                except FloatingPointError as error:
                    if self.recipe.on_nan == "stop":
                        raise
                    self._roll_back(error)

    def _iterate(self, stop: "StopRequests") -> None:
        run = self.run
        run.network.train()
        batches = self.batches()
        self.meter.restart()
        for parts in iter(lambda: [next(batches) for _ in range(self.recipe.accum_iter)], None):
            run.iteration += 1
            self.meter.waited()
            if run.iteration not in self.skipped:
                self.meter.stepped(run, self.step(parts))
            done = run.iteration == self.recipe.total_iter
            stopping = distributed.any_of(stop.requested, run.device)
            self._save(done=done, stopping=stopping)
            if stopping and not done:
                raise Interrupted(f"stopped at iteration {run.iteration}; the same command continues")
            if done:
                return

    def batches(self) -> Iterator[Batch]:
        """This process's batches from the next iteration on."""
        loader, recipe = self.options.train_set, self.recipe
        numbers = SampleNumbers(self.run.iteration, recipe.total_iter, loader.batch_size_per_gpu, recipe.accum_iter)
        return training_batches(
            self.samples,
            numbers,
            workers=loader.num_worker_per_gpu,
            seed=self.options.manual_seed,
            pin_memory=self.run.device.type == "cuda",
        )

    def step(self, parts: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step on the batches ``parts``; the losses, weighted, and the gradient's norm."""
        run, recipe = self.run, self.recipe
        run.set_rates(recipe)
        run.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for i, batch in enumerate(parts):
            with self._synchronised(last=i == len(parts) - 1):
                terms = self._losses(batch)
                total = torch.stack(list(terms.values())).sum()
                self._refuse_infinite(total, batch)
                run.scaler.scale(total).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        run.drop_frozen_gradients()
        run.scaler.unscale_(run.optimizer)
        norm = clip_gradients(run.network, recipe.grad_clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.update_average(recipe.ema_decay)
        return {"loss": sum(sums.values()), **(sums if len(sums) > 1 else {}), "grad_norm": norm.item()}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss of one batch, so scaled that all batches and processes of a step together give its mean or sum."""
        device = self.run.device
        with autocast(device, self.recipe.precision):
            restored = self.run.model(batch["lq"].to(device, non_blocking=True))
        truth = batch["gt"].to(device, non_blocking=True)
        terms = {}
        for name, loss in self.losses.items():
            bounds = self.recipe.terms[name].ramp
            weight = 1.0 if bounds is None else ramp(self.run.iteration, *bounds)
            # DDP averages gradients over processes: a sum must be made up for, a mean divided among the batches
            share = distributed.world_size() if _sums(loss) else 1 / self.recipe.accum_iter
            terms[name] = loss(restored.float(), truth) * (weight * share)
        return terms

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients with the last batch of a step only."""
        model = self.run.model
        if last or not isinstance(model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def _refuse_infinite(self, total: Tensor, batch: Batch) -> None:
        if distributed.any_of(not bool(torch.isfinite(total)), self.run.device):
            names = ", ".join(batch["name"])
            raise FloatingPointError(f"iteration {self.run.iteration}: the loss is {total.item()} on {names}")

    def _roll_back(self, error: FloatingPointError) -> None:
        """Back to the last saved state; the batch that broke the run is left out this time."""
        bad = self.run.iteration
        state = self.experiment.latest_state(self.run.device)
        if state is None:
            raise FloatingPointError(f"{error}; nothing was saved yet to roll back to") from error
        self.skipped.add(bad)
        self.run.restore(state)
        log.warning("%s: rolled back to iteration %d, skipping that batch", error, self.run.iteration)

    def _save(self, *, done: bool, stopping: bool) -> None:
        """Validate and write weights and state when it is time."""
        run, options = self.run, self.options
        figures: dict[str, dict[str, float]] = {}
        if options.test_sets and options.val.val_freq and (done or run.iteration % options.val.val_freq == 0):
            figures = self._validate()
        if not (done or stopping or run.iteration % options.logger.save_checkpoint_freq == 0):
            return
        state = run.state()
        if distributed.is_main():
            assert options.network_g is not None
            path = self.experiment.models / f"net_g_{run.iteration}.safetensors"
            save_network(
                path, run.best_network, options.network_g.describe(), iteration=run.iteration, validation=figures
            )
            self.experiment.save_state(run.iteration, state, options.logger.keep_checkpoints)
        distributed.wait()

    def _validate(self) -> dict[str, dict[str, float]]:
        figures = {}
        for name, section in self.options.test_sets.items():
            images = self.experiment.folder / "visualization" / str(self.run.iteration)
            scores = validate(self.run.best_network, self.options, f"datasets.{name}", section, images)
            figures[name] = {"psnr_y": mean_over_clips(scores, "psnr"), "ssim_y": mean_over_clips(scores, "ssim")}
            if distributed.is_main():
                self.meter.validated(self.run.iteration, name, figures[name])
        self.run.network.train()
        return figures


def validate(network: VideoNet, options: Options, where: str, section: Any, images: Path) -> list[ClipScore]:
    """Figures on one validation set by the code and protocol of `test.py`; clips are shared among processes."""
    device = next(network.parameters()).device
    restorer = network_restorer(network.eval(), device, tile=options.val.tile, precision=options.val.precision)
    clips = construct(TEST_SETS, section, where)
    scores: list[ClipScore] = []
    saved = images if options.val.save_img else None
    for clip, result in evaluate(distributed.share(clips), {"network": restorer}, scale=options.scale, images=saved):
        if isinstance(result, ValueError):
            log.warning("%s: %s: %s", where, clip, result)
        else:
            scores += result
    return [score for part in distributed.gather(scores) for score in part]


class StopRequests:
    """Whether SIGTERM or Ctrl-C has come."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: object) -> None:
        """The signal handler; a second signal ends the process at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("%s: finishing the iteration and saving", signal.Signals(number).name)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Within the block signals that end a process are only noted."""
    stop = StopRequests()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sums(loss: nn.Module) -> bool:
    return getattr(loss, "reduction", "mean") == "sum"
