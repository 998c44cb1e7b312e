"""Train a network: python train.py -opt options/stdan_freq.yml [--set train.optim_g.lr=1e-4 ...]."""

import argparse
import sys

from restore.options import load_options


def main(argv: list[str] | None = None) -> int:
    """Read the options and train; 2 for bad input, with one line that says why."""
    parser = argparse.ArgumentParser(description="Train a network as an options file says; run again to continue.")
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE", help="options file, e.g. options/sample.yml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    arguments = parser.parse_args(argv)
    from restore.training import train  # heavy: after the arguments are known to be good

    try:
        train(load_options(arguments.opt, arguments.set))
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
