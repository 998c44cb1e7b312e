"""A control of energy fusion: python -m bench.shuffled_energies OUT, after python -m bench.ablation --run OUT.

Every trained small network that fuses by energy is scored twice on the clips of its run, with the energies of its
sources and with every source given the weights of the one before it. Where the energies matter, the second must be
worse; where it is not, the network has not learnt to use them.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from archs.layers.energy_attention import EnergyFusion
from archs.layers.energy_fusion import EnergyWeightedFusion
from restore.checkpoint import load_network
from restore.evaluation import default_metrics, evaluate
from restore.methods import network_method
from restore.options import construct, load_options
from restore.test_sets import TEST_SETS


def shuffle(network: nn.Module) -> None:
    """From now on the weights of every band, and the detail of every place, are those of another source."""
    for module in network.modules():
        if isinstance(module, EnergyWeightedFusion):
            module.weigh = _of_another(module.weigh)  # type: ignore[method-assign]
        if isinstance(module, EnergyFusion):
            module.register_forward_pre_hook(_detail_of_another)


def _of_another(weigh):
    def shuffled(v: Tensor, reference=None) -> tuple[Tensor, Tensor]:
        spectra, weights = weigh(v, reference)
        return spectra, weights.roll(1, dims=1)

    return shuffled


def _detail_of_another(module: nn.Module, arguments: tuple) -> tuple:
    fetched, relevance, own, detail = arguments
    return fetched, relevance, own, None if detail is None else detail.roll(1, dims=1)


def scores(run: Path) -> dict[str, dict[str, float]]:
    """PSNR by test set: as trained, and shuffled."""
    options = load_options(run / "options.yml")
    weights = max(run.glob("models/net_g_*.safetensors"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    found: dict[str, dict[str, float]] = {}
    for kind in ("as trained", "shuffled"):
        network = load_network(weights)
        if kind == "shuffled":
            shuffle(network)
        method = network_method(kind, network, torch.device("cpu"))
        for name, section in options.test_sets.items():
            test_set = construct(TEST_SETS, section, f"datasets.{name}")
            metrics = default_metrics(test_set.protocol)
            results = [score for _, score in evaluate(test_set.found, test_set.protocol, [method], metrics)]
            means = [score.mean("psnr") for score in results if not isinstance(score, ValueError)]
            found.setdefault(name, {})[kind] = round(sum(means) / len(means), 4)
    return found


def main() -> None:
    """A JSON line for every run of a row with energy fusion."""
    parser = argparse.ArgumentParser(description="Energy fusion with the energies of the wrong frames.")
    parser.add_argument("runs", type=Path, metavar="OUT", help="folder of python -m bench.ablation --run")
    for run in sorted(parser.parse_args().runs.glob("A[67]-*")):
        print(json.dumps({"run": run.name, **scores(run)}), flush=True)


if __name__ == "__main__":
    main()
