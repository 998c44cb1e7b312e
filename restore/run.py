"""What a training run changes as it goes on: weights, their moving average, optimiser, scaler, random state."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from archs import ARCHS, VideoNet
from archs.action.extractors import ActionExtractor
from restore import distributed
from restore.checkpoint import CheckpointError, load_to_start, read_state
from restore.options import OptionError, Options, TrainOptions, construct
from restore.privileged_training import shipped, with_privilege
from restore.schedule import learning_rate

log = logging.getLogger("restore")


@dataclass
class Run:
    """A run at ``iteration``; ``model`` is the network as a step calls it: compiled, in parallel."""

    network: VideoNet
    model: nn.Module
    average: VideoNet | None  # exponential moving average of the weights
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    iteration: int = 0

    @property
    def best_network(self) -> VideoNet:
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


def begin(options: Options, device: torch.device) -> Run:
    """Everything at iteration 0; `OptionError` where options do not fit each other."""
    recipe = options.train
    assert options.network_g is not None and recipe is not None
    torch.manual_seed(options.manual_seed)
    network = construct(ARCHS, options.network_g, "network_g")
    if network.scale != options.scale:
        raise OptionError(f"scale: {options.scale}, but {options.network_g.type} has scale {network.scale}")
    if options.path.pretrain_network_g:
        fresh = _parts(load_to_start(network, options.path.pretrain_network_g))
        log.info("started from %s; fresh parts: %s", options.path.pretrain_network_g, ", ".join(fresh) or "none")
    if options.path.pretrain_extractor:
        fresh = _parts(load_extractor(network, options.path.pretrain_extractor))
        log.info("extractor from %s; fresh parts: %s", options.path.pretrain_extractor, ", ".join(fresh) or "none")
    network = with_privilege(network, recipe.privileged, pretrained=bool(options.path.pretrain_network_g))
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


def load_extractor(network: VideoNet, path: str) -> list[str]:
    """Copy weights of an action network, or of a ResNet, from a local file into the encoder of ``network``.

    Returns the keys that stayed fresh. `OptionError` where the encoder is no `ActionExtractor`; `CheckpointError` for a
    file that cannot be read or does not fit.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, ActionExtractor):
        raise OptionError("path.pretrain_extractor: is for network_g.extractor: dtf_resnet or atm_resnet; set one")
    state = read_state(path)
    try:
        return [f"encoder.{key}" for key in encoder.load_backbone(state)]
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parts(keys: Sequence[str]) -> list[str]:
    """The parts of a network that keys belong to: their first two names."""
    return list(dict.fromkeys(".".join(key.split(".")[:2]) for key in keys))


def make_optimizer(network: nn.Module, recipe: TrainOptions) -> Optimizer:
    """Adam or AdamW, with a group for every entry of param_groups that matches and one for the rest."""
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
    options = recipe.optim_g
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[options.type]
    return kind(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True)


def lay_channels_last(network: nn.Module) -> None:
    """Kernels of images in channels_last; those with an axis of time, which have no such layout, stay as they are."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def recompute_activations(network: VideoNet) -> None:
    """Keep only the inputs of the network's heavy parts and compute the rest again in the backward pass."""
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
