"""Networks. `ARCHS` and `CLASSIFIERS` are the two tables from a name in an options file to its class."""

from archs.action import CLASSIFIERS
from archs.contract import ClipClassifier, VideoNet
from archs.stdan import STDAN
from archs.stdan_freq import STDANFreq

ARCHS: dict[str, type[VideoNet]] = {"stdan": STDAN, "stdan_freq": STDANFreq}  # clips restored
# CLASSIFIERS: actions in clips recognised

__all__ = ["ARCHS", "CLASSIFIERS", "STDAN", "ClipClassifier", "STDANFreq", "VideoNet"]
