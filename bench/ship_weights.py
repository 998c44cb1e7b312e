"""Make a shipped model of a training run's weights: python -m bench.ship_weights SRC NAME --info KEY=VALUE ...

Stores them in half precision (loading casts them back) as restore/weights/NAME.safetensors, with licence, summary and
whatever else --info gives as metadata, which `python -m restore --list-models` prints.
"""

import argparse

from restore.checkpoint import WEIGHTS, load_network, read_info, save_network


def main() -> None:
    """Read, halve, write."""
    parser = argparse.ArgumentParser(description="Make a shipped model of a training run's weights.")
    parser.add_argument("source", help="a run's net_g_N.safetensors")
    parser.add_argument("name", help="name of the shipped model")
    parser.add_argument("--info", nargs="*", default=[], metavar="KEY=VALUE", help="metadata, e.g. licence=Apache-2.0")
    arguments = parser.parse_args()
    info = read_info(arguments.source)
    described = dict(pair.split("=", 1) for pair in arguments.info)
    path = WEIGHTS / f"{arguments.name}.safetensors"
    network = load_network(arguments.source).half()
    save_network(path, network, info["network"], iteration=info["iteration"], **described)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
