"""Action backbones. `CLASSIFIERS` is the one table from a name in an options file to its class."""

from archs.action.atm_clip import ATMCLIP
from archs.action.atm_resnet import ATMResNet
from archs.action.dtf_net import DTFNet
from archs.action.dtf_transformer import DTFTransformer
from archs.contract import ClipClassifier

CLASSIFIERS: dict[str, type[ClipClassifier]] = {
    "dtf_net": DTFNet,
    "dtf_transformer": DTFTransformer,
    "atm_resnet": ATMResNet,
    "atm_clip": ATMCLIP,
}
