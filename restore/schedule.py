"""The learning rate as a function of the iteration: nothing to save, nothing to get out of step."""

import math

from restore.options import SchedulerOptions


def learning_rate(iteration: int, base: float, scheduler: SchedulerOptions, warmup_iter: int = -1) -> float:
    """The rate of ``iteration`` (the first is 1) in closed form.

    Cosine with hard restarts as in STDAN's recipe: with P the current period and w its restart weight, ``eta_min +
    (w*base - eta_min) (1 + cos(pi (it mod P) / P)) / 2``, eta_min at and after the end. MultiStepLR multiplies by
    gamma at every milestone. A warm-up of n iterations rises linearly to the base rate.
    """
    if 0 < iteration <= warmup_iter:
        return base * iteration / warmup_iter
    if scheduler.type == "Constant":
        return base
    if scheduler.type == "MultiStepLR":
        return base * scheduler.gamma ** sum(iteration >= milestone for milestone in scheduler.milestones)
    start = 0
    for i, period in enumerate(scheduler.periods):
        if iteration < start + period:
            weight = scheduler.restart_weights[i] if scheduler.restart_weights else 1.0
            wave = (1 + math.cos(math.pi * (iteration - start) / period)) / 2
            return scheduler.eta_min + (weight * base - scheduler.eta_min) * wave
        start += period
    return scheduler.eta_min


def ramp(iteration: int, start: int, end: int) -> float:
    """0 until ``start``, 1 from ``end`` on, linear between: the weight of a loss that comes in slowly."""
    return min(1.0, max(0.0, (iteration - start) / max(end - start, 1)))
