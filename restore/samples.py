"""Training samples by number: what every training set does, whatever a sample is.

A sample depends on the seed and its number alone, not on workers, processes or what was drawn before it, so a run
that continues at iteration n sees exactly what an uninterrupted one would have seen.
"""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from restore.clip_sources import SampleError

log = logging.getLogger("restore")

APART = 2**40  # between the numbers of a sample and of what replaces it; more than any run has samples
ATTEMPTS = 100  # files in turn that may be unreadable; only of a set without any readable file ends there


@dataclass(eq=False)
class Samples(Dataset[Mapping[str, Any]]):
    """Samples with a ``name`` each, of which any number >= 0 is valid; subclasses `draw` them.

    A file that cannot be read is logged and passed over: the sample is replaced by another that depends on the seed
    and its number alone; more than ``skip_limit`` such files, counted over all workers, are a SampleError.
    """

    _: KW_ONLY
    skip_limit: int = 10

    def __post_init__(self) -> None:
        if self.skip_limit < 0:
            raise ValueError(f"skip_limit={self.skip_limit} must be at least 0")
        self.seed = 0
        # marks of unreadable files, in memory that all workers share
        self._unreadable = torch.zeros(self.skip_limit + 1, dtype=torch.int64).share_memory_()

    @property
    def text(self) -> str:
        """How much there is."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """A sample by these random numbers. Raises SampleError where a file cannot be read."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """The sample of this number; any number >= 0 is valid."""
        for attempt in range(ATTEMPTS):
            try:
                return self.draw(np.random.default_rng((self.seed, number + APART * attempt)))
            except SampleError as error:
                self._note(error)
        raise SampleError(f"sample {number}", f"{ATTEMPTS} files in turn could not be read; see the log")

    def _note(self, error: SampleError) -> None:
        """Log an unreadable file once; raise where there are too many."""
        mark = zlib.crc32(error.file.encode()) + 1
        if (self._unreadable == mark).any():
            return
        count = int(self._unreadable.count_nonzero())
        if count >= self.skip_limit:
            raise SampleError(error.file, f"{error.fault}; more than skip_limit={self.skip_limit} files like this")
        self._unreadable[count] = mark
        log.warning("%s; passed over", error)
