"""Networks. `ARCHS` is the one table from a name in an options file to its class."""

from archs.contract import VideoNet
from archs.stdan import STDAN
from archs.stdan_freq import STDANFreq

ARCHS: dict[str, type[VideoNet]] = {"stdan": STDAN, "stdan_freq": STDANFreq}

__all__ = ["ARCHS", "STDAN", "STDANFreq", "VideoNet"]
