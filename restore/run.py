"""What a training run changes as it goes on: weights, their moving average, optimiser, scaler, random state."""

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from archs import VideoNet
from restore import distributed
from restore.options import OptionError, Options, TrainOptions
from restore.privileged_training import shipped
from restore.schedule import learning_rate


@dataclass
class Run:
    """A run at ``iteration``; ``model`` is the network as a step calls it: compiled, in parallel."""

    network: nn.Module
    model: nn.Module
    average: nn.Module | None  # exponential moving average of the weights
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    iteration: int = 0

    @property
    def best_network(self) -> nn.Module:
        """The weights to validate and ship: the average where there is one, without what is for training only."""
        return shipped(self.average or self.network)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def state(self) -> dict[str, Any]:
        """All of it, for `restore.experiment.Experiment.save_state`; every process must call it."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": distributed.gather(_random_state()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave.

        The number of processes may differ from the one before. A step then sees as many batches as there are
        processes now, and `restore.data.SampleNumbers` counts as if there had always been so many: with fewer
        processes than before some samples come a second time, with more some never come. Every process takes up the
        random state of its rank; ranks without one draw as at the start of a run. From then on the run is as exact as
        any, but it is no longer the run that would have been.
        """
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        if distributed.rank() < len(state["rng"]):
            _set_random_state(state["rng"][distributed.rank()])

    def set_rates(self, recipe: TrainOptions) -> None:
        """The learning rate of this iteration, by group."""
        rate = learning_rate(self.iteration, recipe.optim_g.lr, recipe.scheduler, recipe.warmup_iter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]

    def drop_frozen_gradients(self) -> None:
        """Parameters that are frozen at this iteration are left out of the step, their moments too."""
        for group in self.optimizer.param_groups:
            if self.iteration <= group["freeze_until"]:
                for parameter in group["params"]:
                    parameter.grad = None

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- d * average + (1 - d) * network; d rises to ``decay`` so that the start is soon forgotten."""
        if self.average is None:
            return
        decay = min(decay, self.iteration / (self.iteration + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        for mine, theirs in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mine.copy_(theirs)


def begin(options: Options, network: nn.Module, device: torch.device) -> Run:
    """Everything at iteration 0, for a ``network`` on the CPU; `OptionError` where options do not fit each other."""
    recipe = options.train
    assert recipe is not None
    torch.manual_seed(options.manual_seed + distributed.rank())  # stochastic depth differs between processes
    network = network.to(device)
    if recipe.channels_last:
        lay_channels_last(network)
    average = deepcopy(network).requires_grad_(False) if recipe.ema_decay else None
    optimizer = make_optimizer(network, recipe)
    if recipe.activation_checkpointing:
        recompute_activations(network)
    model = torch.compile(network) if recipe.compile else network
    model = distributed.parallel(model, find_unused_parameters=options.find_unused_parameters)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    return Run(network, model, average, optimizer, scaler)


def make_optimizer(network: nn.Module, recipe: TrainOptions) -> Optimizer:
    """Adam, AdamW or SGD, with a group for every entry of param_groups that matches and one for the rest."""
    left = dict(network.named_parameters())
    groups = []
    for i, entry in enumerate(recipe.param_groups):
        mine = [name for name in left if re.search(entry.match, name)]
        if not mine:
            raise OptionError(f"train.param_groups[{i}].match: {entry.match!r} matches no parameter that is left")
        parameters = [left.pop(name) for name in mine]
        groups.append({"params": parameters, "lr_mult": entry.lr_mult, "freeze_until": entry.freeze_until})
    if left:
        groups.append({"params": list(left.values()), "lr_mult": 1.0, "freeze_until": 0})
    chosen = recipe.optim_g
    shared: dict[str, Any] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay, "fused": True}
    if chosen.type == "SGD":
        return torch.optim.SGD(groups, momentum=chosen.momentum, nesterov=chosen.nesterov, **shared)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[chosen.type]
    return kind(groups, betas=chosen.betas, **shared)


def lay_channels_last(network: nn.Module) -> None:
    """Kernels of images in channels_last; those with an axis of time, which have no such layout, stay as they are."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def recompute_activations(network: nn.Module) -> None:
    """Keep only the inputs of the network's heavy parts and compute the rest again in the backward pass."""
    assert isinstance(network, VideoNet)
    for module in network.heavy_modules():
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def clip_gradients(network: nn.Module, limit: float | None) -> Tensor:
    """The norm of all gradients, which are scaled down to ``limit`` if it is larger."""
    return nn.utils.clip_grad_norm_(network.parameters(), limit or math.inf)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
