"""What a run tells while it goes on: averages between two lines, on the console, as JSON and for TensorBoard."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from restore import distributed
from restore.experiment import Experiment
from restore.log import append_json, duration
from restore.memory import peak_memory_mb
from restore.options import Options
from restore.run import Run

log = logging.getLogger("restore")


class Meter:
    """Averages over print_freq steps, of this process's times and every process's losses."""

    def __init__(self, options: Options, experiment: Experiment, total: int) -> None:
        self.options, self.experiment, self.total = options, experiment, total
        assert options.train is not None
        self.samples = options.train_set.batch_size_per_gpu * options.train.accum_iter * distributed.world_size()
        self.restart()

    @cached_property
    def board(self) -> Any:
        """TensorBoard's writer where there is one; made with the first figures, since it opens a file."""
        wanted = self.options.logger.use_tb_logger and distributed.is_main()
        return summary_writer()(Path("tb_logger") / self.options.name) if wanted else None

    def restart(self) -> None:
        """Forget what was counted since the last line."""
        self.count, self.waiting, self.sums = 0, 0.0, dict[str, float]()
        self.started = self.mark = time.monotonic()

    def waited(self) -> None:
        """A batch has arrived: the time since the last step was spent waiting for it."""
        self.waiting += time.monotonic() - self.mark

    def stepped(self, run: Run, terms: Mapping[str, float]) -> None:
        """A step is done; every print_freq steps a line is written."""
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        if run.iteration % self.options.logger.print_freq == 0 or run.iteration == self.total:
            self._write(run)
            self.restart()
        self.mark = time.monotonic()

    def validated(self, iteration: int, name: str, figures: Mapping[str, float]) -> None:
        """Write the figures of one validation set."""
        append_json(self.experiment.records, {"iteration": iteration, "validation": name, **figures})
        log.info("it %d  %s: %s", iteration, name, "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        self._draw(iteration, {f"{name}/{key}": value for key, value in figures.items()})

    def _write(self, run: Run) -> None:
        seconds = time.monotonic() - self.started
        means = distributed.mean({key: value / self.count for key, value in self.sums.items()}, run.device)
        if not distributed.is_main():
            return
        rate, waiting = self.count / seconds, self.waiting / seconds
        record = {
            "iteration": run.iteration,
            "lr": run.optimizer.param_groups[-1]["lr"],
            **means,
            "samples_per_s": round(rate * self.samples, 3),
            "data_share": round(waiting, 4),
            "memory_mb": peak_memory_mb(),
        }
        append_json(self.experiment.records, record)
        self._draw(run.iteration, record)
        losses = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
        log.info(
            "it %d/%d  lr %.2e  %s  %.2f samples/s  data %.0f %%  %d MB  eta %s",
            *(run.iteration, self.total, record["lr"], losses, rate * self.samples, 100 * waiting),
            *(record["memory_mb"], duration((self.total - run.iteration) / rate)),
        )

    def _draw(self, iteration: int, record: Mapping[str, float]) -> None:
        for key, value in record.items():
            if self.board is not None and key != "iteration":
                self.board.add_scalar(key, value, iteration)


def summary_writer() -> Callable[..., Any]:
    """TensorBoard's class that writes; ValueError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("logger.use_tb_logger needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter
