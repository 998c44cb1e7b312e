"""What a training run would be, before it is begun: `train.py --dry-run` builds everything and writes nothing."""

import time
from collections.abc import Mapping, Sequence

from restore import distributed
from restore.cost import count_gmac, count_parameters, synchronize
from restore.log import duration
from restore.memory import peak_memory_mb
from restore.options import Options
from restore.training import Batch, Loop, prepared

WARM = 60.0  # seconds: a first step below this is followed by a second, which tells what the others will take


def dry_run(options: Options) -> None:
    """Build all that ``options`` name, run a batch forward and backward, and print what the run would cost.

    Nothing is written. Raises as `restore.training.train` would: bad options, bad data, a loss that is not finite.
    """
    loop = prepared(options)
    run, recipe = loop.run, loop.recipe
    loop.check_validation()
    run.iteration = 1
    batches = loop.batches()
    started = time.perf_counter()
    parts = [next(batches) for _ in range(recipe.accum_iter)]
    reading = time.perf_counter() - started
    run.network.train()
    losses, seconds = timed_step(loop, parts)
    if seconds < WARM:
        losses, seconds = timed_step(loop, parts)
    if distributed.is_main():
        print("\n".join(estimate(loop, parts[0], losses, seconds, reading)))
        for name, test_set in loop.test_sets.items():
            print(f"test set   {name}: {len(test_set)} clips")


def estimate(
    loop: Loop, batch: Batch, losses: Mapping[str, float], seconds: float, reading: float
) -> list[str]:
    """The lines that say what the run would cost, from one step that took ``seconds``."""
    options, recipe, network = loop.options, loop.recipe, loop.run.network
    samples, saved = loop.samples, options.logger.keep_checkpoints
    many = options.train_set.batch_size_per_gpu * recipe.accum_iter * distributed.world_size()
    frames, _, *size = batch[loop.task.source].shape[1:]
    gmac = count_gmac(network.eval(), frames, *size)
    weights = 4 * count_parameters(network) / 2**20
    moments = 1 if recipe.optim_g.type == "SGD" else 2
    state = (1 + moments + bool(loop.run.average)) * weights
    terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    clip = loop.task.shapes(batch, network)
    return [
        f"network    {type(network).__name__}, {count_parameters(network):,} parameters, on {loop.run.device}",
        f"clip       {clip}, {gmac:.1f} GMAC forward",
        f"data       {samples.text}; first batch in {reading:.1f} s",
        f"step       {many} clips in {seconds:.2f} s, {many / seconds:.2f} samples/s; {terms}",
        f"memory     {peak_memory_mb()} MB at its peak",
        f"disk       {weights:.0f} MB of weights at every save, {saved} states of {state:.0f} MB",
        f"whole run  {recipe.total_iter:,} iterations, about {duration(recipe.total_iter * seconds)} and validation",
    ]


def timed_step(loop: Loop, parts: Sequence[Batch]) -> tuple[dict[str, float], float]:
    """The losses of one step, and its seconds."""
    synchronize(loop.run.device)
    started = time.perf_counter()
    losses = loop.step(parts)
    synchronize(loop.run.device)
    return losses, time.perf_counter() - started
