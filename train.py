"""Train a network: python train.py -opt options/stdan_freq.yml [--set train.optim_g.lr=1e-4 ...]."""

import argparse
import sys

from restore.options import load_options


def main(argv: list[str] | None = None) -> int:
    """Read the options and train; with a line that says why, 2 for bad input, 1 for a failure, 130 if asked to stop."""
    parser = argparse.ArgumentParser(description="Train a network as an options file says; run again to continue.")
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE", help="options file, e.g. options/sample.yml")
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="how several processes were started"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, run one batch, print what the run would cost"
    )
    arguments = parser.parse_args(argv)
    from restore import distributed  # heavy: after the arguments are known to be good
    from restore.dry_run import dry_run
    from restore.interruptions import Interrupted, LoaderError, loader_errors
    from restore.training import train

    try:
        options = load_options(arguments.opt, arguments.set)
        with distributed.processes(arguments.launcher), loader_errors():
            (dry_run if arguments.dry_run else train)(options)
    except ValueError as error:
        return complain(f"error: {error}", 2)
    except OSError as error:
        return complain(f"error: {error}; what was saved before is intact", 2)
    except (FloatingPointError, LoaderError, distributed.LostProcess) as error:
        return complain(f"stopped: {error}", 1)
    except Interrupted as reason:
        return complain(str(reason), 130)
    except KeyboardInterrupt:
        return complain("ended at once; what was saved before is intact", 130)
    return 0


def complain(message: str, code: int) -> int:
    """One line on stderr and the exit code."""
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
