"""The task of most runs: clips in, restored clips out."""

import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from archs import ARCHS, VideoNet
from archs.action.extractors import ActionExtractor
from restore import distributed
from restore.checkpoint import CheckpointError, load_to_start, read_state
from restore.crops import ClipCrops
from restore.data import DATASETS
from restore.evaluation import check_methods, chosen_metrics, evaluate
from restore.interruptions import StopRequests
from restore.losses import LOSSES
from restore.methods import network_method
from restore.metric_table import METRICS
from restore.options import OptionError, Options, check_arguments, construct
from restore.privileged_training import with_privilege
from restore.scores import ClipScore, mean_over_clips
from restore.task import Task
from restore.test_sets import TEST_SETS, TestClips

log = logging.getLogger("restore")


class Restoration(Task):
    """Networks of `archs.ARCHS`."""

    source, target = "lq", "gt"
    data_sets, test_sets, losses = DATASETS, TEST_SETS, LOSSES

    def check(self, options: Options) -> None:
        """As every task; and the metrics."""
        super().check(options)
        for name, metric in options.val.metrics.items():
            check_arguments(METRICS, metric, f"val.metrics.{name}")

    def network(self, options: Options) -> VideoNet:
        """The network, with what privileged training puts around it."""
        assert options.network_g is not None and options.train is not None
        network = construct(ARCHS, options.network_g, "network_g")
        if network.scale != options.scale:
            raise OptionError(f"scale: {options.scale}, but {options.network_g.type} has scale {network.scale}")
        weights, extractor = options.path.pretrain_network_g, options.path.pretrain_extractor
        if weights:
            fresh = parts(load_to_start(network, weights))
            log.info("started from %s; fresh parts: %s", weights, ", ".join(fresh) or "none")
        if extractor:
            fresh = parts(load_extractor(network, extractor))
            log.info("extractor from %s; fresh parts: %s", extractor, ", ".join(fresh) or "none")
        return with_privilege(network, options.train.privileged, pretrained=bool(weights))

    def samples(self, options: Options, network: nn.Module) -> ClipCrops:
        """Scales in space and time must be those of the network."""
        samples: ClipCrops = construct(DATASETS, options.train_set.dataset, "datasets.train")
        for key in ("scale", "time_scale"):
            made, wanted = getattr(samples, key), getattr(network, key)
            if made != wanted:
                raise OptionError(
                    f"datasets.train.{key}: {made}, but the network has {key} {wanted}: set {key}: {wanted} there or "
                    f"network_g.{key}: {made}"
                )
        return samples

    def check_validation(self, options: Options, network: nn.Module, name: str, test_set: TestClips) -> None:
        """Scales of the network, and metrics that can be had."""
        assert isinstance(network, VideoNet)
        device = next(network.parameters()).device
        check_methods(name, test_set.protocol, [network_method("network", network, device)])
        chosen_metrics(options.val.metrics, test_set.protocol)

    def validate(
        self, options: Options, network: nn.Module, name: str, test_set: TestClips, images: Path, stop: StopRequests
    ) -> dict[str, float]:
        """The means over clips."""
        assert isinstance(network, VideoNet)
        device = next(network.parameters()).device
        method = network_method(
            "network", network.eval(), device, tile=options.val.tile, precision=options.val.precision
        )
        check_methods(name, test_set.protocol, [method])
        metrics = chosen_metrics(options.val.metrics, test_set.protocol)
        saved = images if options.val.save_img else None
        mine: list[ClipScore] = []
        clips = takewhile(lambda _: not stop.requested, distributed.share(test_set.found))
        for clip, result in evaluate(clips, test_set.protocol, [method], metrics, images=saved):
            if isinstance(result, ValueError):
                log.warning("datasets.%s: %s: %s", name, clip, result)
            else:
                mine.append(result)
        scores = [score for part in distributed.gather(mine) for score in part]
        return {metric: mean_over_clips(scores, metric) for metric in metrics}

    def shapes(self, batch: Mapping[str, Any], network: nn.Module) -> str:
        """Frames and sizes in and out."""
        (frames, _, *size), (frames_out, _, *size_out) = batch["lq"].shape[1:], batch["gt"].shape[1:]
        return f"{frames} x {size[0]}x{size[1]} -> {frames_out} x {size_out[0]}x{size_out[1]}"


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


def parts(keys: Sequence[str]) -> list[str]:
    """The parts of a network that keys belong to: their first two names."""
    return list(dict.fromkeys(".".join(key.split(".")[:2]) for key in keys))
