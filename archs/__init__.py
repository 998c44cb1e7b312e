"""Networks. `ARCHS` is the one table from a name in an options file to its class."""

from archs.contract import VideoNet
from archs.stdan import STDAN

ARCHS: dict[str, type[VideoNet]] = {"stdan": STDAN}

__all__ = ["ARCHS", "STDAN", "VideoNet"]
