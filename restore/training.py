"""The training loop: step, log, validate, save; running the same command again continues exactly.

One step reads `restore.data`, runs the network under autocast, takes the losses in float32, and steps optimiser and
moving average (`restore.run`). Nothing random depends on anything but seed, iteration and process, so a continued run
repeats what an uninterrupted one would have done.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archs import CLASSIFIERS, VideoNet
from restore import distributed
from restore.checkpoint import save_network
from restore.classification import Classification
from restore.cost import count_parameters
from restore.data import SampleNumbers, training_batches
from restore.device import autocast, pick_device
from restore.experiment import Experiment
from restore.interruptions import Interrupted, StopRequests, end_workers_at_exit, stop_requests
from restore.log import console_logger
from restore.losses import AuxiliaryLoss
from restore.memory import keep_freed_memory
from restore.options import OptionError, Options, TrainOptions, construct
from restore.privileged_training import PrivilegedTeacher, save_teacher
from restore.progress import Meter, summary_writer
from restore.restoration import Restoration
from restore.run import Run, begin, clip_gradients
from restore.samples import Samples
from restore.schedule import ramp
from restore.task import Task

log = logging.getLogger("restore")

Batch = Mapping[str, Any]  # the task's source and target, and name
LEAST_SCALE = 2.0**-20  # of an fp16 loss: gradients that overflow even then are not finite at all


def train(options: Options) -> None:
    """Train as ``options`` say until total_iter, continuing what the experiment's folder holds.

    Raises ValueError for bad options or data, FloatingPointError for a loss or gradient that is not finite,
    `Interrupted` when asked to stop.
    """
    loop = prepared(options)
    run, experiment = loop.run, loop.experiment
    if distributed.is_main():
        experiment.claim(options)
        console_logger(file=experiment.folder / "train.log")
    distributed.wait()
    continue_where_it_stopped(run, experiment)
    log.info("%s: %d parameters on %s", type(run.network).__name__, count_parameters(run.network), run.device)
    loop.go_on()


def prepared(options: Options) -> "Loop":
    """A run at iteration 0, with all that it needs; nothing is written. Raises ValueError as `train`."""
    task, recipe = check(options)
    keep_freed_memory()
    use_threads(options)
    torch.manual_seed(options.manual_seed)
    run = begin(options, task.network(options), pick_device(options.device))
    samples = task.samples(options, run.network)
    return Loop(options, task, recipe, run, samples, Experiment(Path(options.path.experiments) / options.name))


def check(options: Options) -> tuple[Task, TrainOptions]:
    """Everything that can be refused before any work; returns what is trained for, and the section ``train``."""
    if options.train is None or options.network_g is None:
        raise OptionError("training needs the sections 'train' and 'network_g'")
    task = Classification() if options.network_g.type in CLASSIFIERS else Restoration()
    task.check(options)
    if options.logger.use_tb_logger:
        summary_writer()
    return task, options.train


def continue_where_it_stopped(run: Run, experiment: Experiment) -> None:
    """Restore the newest state if there is one. ValueError where processes find states of different iterations."""
    state = experiment.latest_state(run.device)
    if state is not None:
        run.restore(state)
        log.info("continuing at iteration %d", run.iteration)
        now, before = distributed.world_size(), len(state["rng"])
        if now != before and distributed.is_main():
            log.warning(
                "processes: %d saved this, %d continue, so a step sees %g times the clips", before, now, now / before
            )
    found = distributed.gather(run.iteration)
    if len(set(found)) > 1:
        raise ValueError(
            f"{experiment.states}: processes find different iterations there ({', '.join(map(str, found))}); "
            "path.experiments must be a folder that all of them share"
        )


def use_threads(options: Options) -> None:
    """As many threads of the CPU as the options say."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)


class Loop:
    """One run's iterations."""

    def __init__(
        self, options: Options, task: Task, recipe: TrainOptions, run: Run, samples: Samples, experiment: Experiment
    ) -> None:
        self.options, self.task, self.recipe, self.run = options, task, recipe, run
        self.samples, self.experiment = samples, experiment
        self.losses = {
            name: construct(task.losses, term.loss, f"train.losses.{name}") for name, term in recipe.terms.items()
        }
        self.meter = Meter(options, experiment, recipe.total_iter)
        self.skipped: set[int] = set()  # iterations whose batch has made the loss infinite

    def go_on(self) -> None:
        """Run from where the state stands to total_iter."""
        if self.options.val.val_freq:
            self.check_validation()
        with stop_requests() as stop:
            while self.run.iteration < self.recipe.total_iter:
                try:
                    self._iterate(stop)
                except FloatingPointError as error:
                    if self.recipe.on_nan == "stop":
                        raise
                    self._roll_back(error)

    def _iterate(self, stop: StopRequests) -> None:
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
            figures = self._validate(stop, done=done)
            stopping = distributed.any_of(stop.requested, run.device)
            if done or stopping or run.iteration % self.options.logger.save_checkpoint_freq == 0:
                self._save(figures)
            if stopping and not done:
                raise Interrupted(f"stopped at iteration {run.iteration}; the same command continues")
            if done:
                return

    def batches(self) -> Iterator[Batch]:
        """This process's batches from the next iteration on."""
        loader, recipe = self.options.train_set, self.recipe
        numbers = SampleNumbers(self.run.iteration, recipe.total_iter, loader.batch_size_per_gpu, recipe.accum_iter)
        end_workers_at_exit()
        with torch.random.fork_rng(devices=[]):  # a loader draws a number from the state that continuing has restored
            return training_batches(
                self.samples,
                numbers,
                workers=loader.num_worker_per_gpu,
                seed=self.options.manual_seed,
                pin_memory=self.run.device.type == "cuda",
            )

    def step(self, parts: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step on the batches ``parts``; the losses, weighted, and the gradient's norm.

        FloatingPointError where they are not finite. With fp16 the scaled gradients may overflow: the step is then
        skipped, with 0 for the norm, and the scale halved.
        """
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
        norm = clip_gradients(run.network, recipe.grad_clip).item()
        overflow = not math.isfinite(norm)
        if overflow and (not run.scaler.is_enabled() or run.scaler.get_scale() < LEAST_SCALE):
            run.scaler.update()  # ends the scaler's step, so that a run that is rolled back can begin one
            raise FloatingPointError(f"iteration {run.iteration}: the gradient's norm is {norm} on {_names(parts)}")
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.update_average(recipe.ema_decay)
        skipped = {"skipped": float(overflow)} if run.scaler.is_enabled() else {}
        norms = {"grad_norm": 0.0 if overflow else norm, **skipped}
        return {"loss": sum(sums.values()), **(sums if len(sums) > 1 else {}), **norms}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss of one batch, so scaled that all batches and processes of a step together give its mean or sum."""
        device = self.run.device
        clip, truth = (batch[key].to(device, non_blocking=True) for key in (self.task.source, self.task.target))
        with autocast(device, self.recipe.precision):
            result = self.run.model(clip, truth) if self.recipe.privileged else self.run.model(clip)
        terms = {}
        for name, loss in self.losses.items():
            bounds = self.recipe.terms[name].ramp
            weight = 1.0 if bounds is None else ramp(self.run.iteration, *bounds)
            # DDP averages gradients over processes: a sum must be made up for, a mean divided among the batches
            share = distributed.world_size() if _sums(loss) else 1 / self.recipe.accum_iter
            terms[name] = self._value(loss, result, truth) * (weight * share)
        return terms

    def _value(self, loss: nn.Module, result: Tensor, truth: Tensor) -> Tensor:
        """A loss of the result, or what the network has left of its own in the forward pass."""
        if isinstance(loss, AuxiliaryLoss):
            assert isinstance(self.run.network, VideoNet)
            return loss(self.run.network.auxiliary_losses())
        return loss(result.float(), truth)

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients with the last batch of a step only."""
        model = self.run.model
        if last or not isinstance(model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def _refuse_infinite(self, total: Tensor, batch: Batch) -> None:
        if distributed.any_of(not bool(torch.isfinite(total)), self.run.device):
            raise FloatingPointError(f"iteration {self.run.iteration}: the loss is {total.item()} on {_names([batch])}")

    def _roll_back(self, error: FloatingPointError) -> None:
        """Back to the last saved state; the batch that broke the run is left out this time."""
        bad = self.run.iteration
        state = self.experiment.latest_state(self.run.device)
        if state is None:
            raise FloatingPointError(f"{error}; nothing was saved yet to roll back to") from error
        self.skipped.add(bad)
        self.run.restore(state)
        log.warning("%s: rolled back to iteration %d, skipping that batch", error, self.run.iteration)

    def _save(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Write weights, with the ``figures`` of their validation, and state."""
        run, options = self.run, self.options
        state = run.state()
        if distributed.is_main():
            assert options.network_g is not None
            models, n, description = self.experiment.models, run.iteration, options.network_g.describe()
            path = models / f"net_g_{n}.safetensors"
            about = self.task.about(self.samples)
            save_network(path, run.best_network, description, iteration=n, validation=figures, **about)
            teacher = run.average or run.network
            if isinstance(teacher, PrivilegedTeacher):
                save_teacher(models / f"teacher_{n}.safetensors", teacher, description, iteration=n)
            self.experiment.save_state(run.iteration, state, options.logger.keep_checkpoints)
        distributed.wait()

    @cached_property
    def test_sets(self) -> dict[str, Sized]:
        """The validation sets by name."""
        sections = self.options.test_sets.items()
        return {name: construct(self.task.test_sets, section, f"datasets.{name}") for name, section in sections}

    def check_validation(self) -> None:
        """Raise ValueError now for test sets and metrics that the first validation would find missing."""
        for name, test_set in self.test_sets.items():
            self.task.check_validation(self.options, self.run.network, name, test_set)

    def _validate(self, stop: StopRequests, *, done: bool) -> dict[str, dict[str, float]]:
        """Figures of the test sets when it is time; a request to stop ends it, but for the one at the run's end."""
        run, often = self.run, self.options.val.val_freq
        figures: dict[str, dict[str, float]] = {}
        if not often or not (done or run.iteration % often == 0):
            return figures
        if done:
            stop = StopRequests()
        for name, test_set in self.test_sets.items():
            images = self.experiment.folder / "visualization" / str(run.iteration)
            means = self.task.validate(self.options, run.best_network, name, test_set, images, stop)
            if distributed.any_of(stop.requested, run.device):
                log.info("it %d  %s: asked to stop, not validated", run.iteration, name)
                break
            figures[name] = means
            if distributed.is_main():
                self.meter.validated(run.iteration, name, means)
        run.network.train()
        return figures


def _names(parts: Sequence[Batch]) -> str:
    return ", ".join(name for batch in parts for name in batch["name"])


def _sums(loss: nn.Module) -> bool:
    return getattr(loss, "reduction", "mean") == "sum"
