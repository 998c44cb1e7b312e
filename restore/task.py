"""What a run trains for: the few things in which restoring and classifying clips differ for the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from restore.interruptions import StopRequests
from restore.options import Options, check_arguments
from restore.samples import Samples


class Task(ABC):
    """A network learns to give a batch's ``target`` for its ``source``; a type's name is looked up in these tables."""

    source: ClassVar[str]
    target: ClassVar[str]
    data_sets: ClassVar[Mapping[str, Callable[..., Samples]]]
    test_sets: ClassVar[Mapping[str, Callable[..., Sized]]]
    losses: ClassVar[Mapping[str, Callable[..., nn.Module]]]

    def check(self, options: Options) -> None:
        """Refuse what can be refused before any work: `OptionError`."""
        assert options.train is not None
        check_arguments(self.data_sets, options.train_set.dataset, "datasets.train")
        for name, section in options.test_sets.items():
            check_arguments(self.test_sets, section, f"datasets.{name}")
        for name, term in options.train.terms.items():
            check_arguments(self.losses, term.loss, f"train.losses.{name}")

    @abstractmethod
    def network(self, options: Options) -> nn.Module:
        """The network to train, with the weights it starts from. `OptionError` and `CheckpointError`."""

    @abstractmethod
    def samples(self, options: Options, network: nn.Module) -> Samples:
        """The set datasets.train; `OptionError` where its samples are not what ``network`` learns from."""

    @abstractmethod
    def check_validation(self, options: Options, network: nn.Module, name: str, test_set: Any) -> None:
        """Raise ValueError now for a test set and metrics that the first validation would find missing."""

    @abstractmethod
    def validate(
        self, options: Options, network: nn.Module, name: str, test_set: Any, images: Path, stop: StopRequests
    ) -> dict[str, float]:
        """Figures on one validation set by the code and protocol of `test.py`; clips are shared among processes.

        Every process gets the same figures; clips after a request to stop are missing in them.
        """

    def about(self, samples: Samples) -> dict[str, Any]:
        """What a file of weights has to say beside network and figures."""
        return {}

    @abstractmethod
    def shapes(self, batch: Mapping[str, Any], network: nn.Module) -> str:
        """What a sample is, for the dry run."""
