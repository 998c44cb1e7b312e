"""The task of classifiers: clips in, logits of actions out."""

import logging
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from archs import CLASSIFIERS, ClipClassifier
from restore import distributed
from restore.action_scores import Guess, figures, guesses, labels_of
from restore.action_sets import ACTION_SETS, ACTION_TEST_SETS
from restore.backbone_weights import start_classifier
from restore.device import resolve_precision
from restore.interruptions import StopRequests
from restore.labelled_clips import ActionSamples, ActionViews
from restore.losses import LABEL_LOSSES
from restore.options import OptionError, Options, construct
from restore.samples import Samples
from restore.task import Task

log = logging.getLogger("restore")


class Classification(Task):
    """Networks of `archs.CLASSIFIERS`."""

    source, target = "clip", "label"
    data_sets, test_sets, losses = ACTION_SETS, ACTION_TEST_SETS, LABEL_LOSSES

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None  # of the classes that are learnt, as soon as `samples` has them

    def check(self, options: Options) -> None:
        """As every task; and what is for restoration alone."""
        assert options.train is not None
        for key, given in {
            "val.metrics": options.val.metrics,
            "val.save_img": options.val.save_img,
            "val.tile": options.val.tile,
            "train.privileged": options.train.privileged,
            "path.pretrain_extractor": options.path.pretrain_extractor,
        }.items():
            if given:
                raise OptionError(f"{key}: is for networks that restore; classifiers are scored by top-1 and top-5")
        if options.train.activation_checkpointing:
            raise OptionError(
                "train.activation_checkpointing: not with classifiers, whose norms would count every batch twice; "
                "use train.accum_iter"
            )
        super().check(options)

    def network(self, options: Options) -> ClipClassifier:
        """The network, with weights of its own kind or inflated ones of images where path.pretrain_network_g is set."""
        assert options.network_g is not None
        network = construct(CLASSIFIERS, options.network_g, "network_g")
        path = options.path.pretrain_network_g
        if path:
            fresh = start_classifier(network, path)
            log.info("started from %s; %d of %d weights fresh", path, len(fresh), len(network.state_dict()))
        return network

    def samples(self, options: Options, network: nn.Module) -> ActionSamples:
        """Clips must be long enough and classes those of the network."""
        assert isinstance(network, ClipClassifier)
        samples = construct(ACTION_SETS, options.train_set.dataset, "datasets.train")
        _fits("datasets.train", network, samples)
        if samples.names is not None and len(samples.names) != network.classes:
            many, set_to = len(samples.names), f"network_g.classes: {len(samples.names)}"
            raise OptionError(f"datasets.train: {many} classes, but network_g has {network.classes}: set {set_to}")
        highest = max(samples.clips, key=lambda clip: clip.label)
        if highest.label >= network.classes:
            there = f"network_g has classes 0 .. {network.classes - 1}"
            raise OptionError(f"datasets.train: label {highest.label} of {highest.name} is out of range: {there}")
        self.names = samples.names
        return samples

    def check_validation(self, options: Options, network: nn.Module, name: str, test_set: ActionViews) -> None:
        """Clips must be long enough and classes among those of the training set."""
        assert isinstance(network, ClipClassifier)
        _fits(f"datasets.{name}", network, test_set)
        self._labels(network, name, test_set)

    def validate(
        self, options: Options, network: nn.Module, name: str, test_set: ActionViews, images: Path, stop: StopRequests
    ) -> dict[str, float]:
        """Top-1, top-5 and the mean over classes, in percent."""
        assert isinstance(network, ClipClassifier)
        labels = self._labels(network, name, test_set)
        precision = resolve_precision(options.val.precision, next(network.parameters()).device)
        mine: list[Guess] = []
        clips = takewhile(lambda _: not stop.requested, distributed.share(test_set.found))
        for clip, guess in guesses(network.eval(), test_set, clips, labels, precision):
            if isinstance(guess, ValueError):
                log.warning("datasets.%s: %s: %s", name, clip.name, guess)
            else:
                mine.append(guess)
        return figures([guess for part in distributed.gather(mine) for guess in part])

    def about(self, samples: Samples) -> dict[str, Any]:
        """The names of the classes, and how clips were sampled."""
        assert isinstance(samples, ActionSamples)
        names = {} if samples.names is None else {"classes": list(samples.names)}
        return {**names, "clips": f"{samples.frames.text}, {samples.size}x{samples.size}"}

    def shapes(self, batch: Mapping[str, Any], network: nn.Module) -> str:
        """Frames, sizes and classes."""
        assert isinstance(network, ClipClassifier)
        frames, _, height, width = batch["clip"].shape[1:]
        return f"{frames} x {height}x{width} -> {network.classes} classes"

    def _labels(self, network: ClipClassifier, name: str, test_set: ActionViews) -> dict[int, int]:
        """Of a validation set, by the names of the training set."""
        try:
            return labels_of(test_set, network, self.names)
        except ValueError as error:
            raise OptionError(f"datasets.{name}: {error}") from error


def _fits(where: str, network: ClipClassifier, clips: ActionSamples | ActionViews) -> None:
    try:
        network.check_clips(clips.num_frame, clips.size)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
