"""Score networks on ground truth: python test.py -opt options/test_vid4.yml [--results theirs/] [--report page.html].

Test sets of labelled clips score classifiers: python test.py -opt options/test_action.yml.

Figures of finished clips are kept in results/<name>/, so that an interrupted run continues; torchrun shares the clips.
"""

import argparse
import shlex
import sys
from pathlib import Path

from restore.options import load_options


def main(argv: list[str] | None = None) -> int:
    """Read the options, score every test set, print tables; 2 where something was bad, with one line for each."""
    parser = argparse.ArgumentParser(description="Score networks by the protocol that an options file names.")
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE", help="options file, e.g. options/test_vid4.yml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    parser.add_argument(
        "--results", action="append", default=[], metavar="[NAME=]DIR", help="score results that are on disk, too"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with tables, curves and pictures")
    parser.add_argument(
        "--claimed", type=float, metavar="DB", help="a published PSNR: say which convention (RGB, crop ...) meets it"
    )
    parser.add_argument("--anew", action="store_true", help="forget the figures of an earlier run")
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="how several processes were started"
    )
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "test.py", *(sys.argv[1:] if argv is None else argv)])
    from restore import distributed  # heavy: after the arguments are known to be good
    from restore.action_scoring import is_of_labels, score_classifiers
    from restore.scoring import score

    try:
        options = load_options(arguments.opt, arguments.set)
        with distributed.processes(arguments.launcher):
            if is_of_labels(options):
                if arguments.results or arguments.report or arguments.claimed is not None:
                    raise ValueError("--results, --report and --claimed are for restored clips, not for classifiers")
                return 0 if score_classifiers(options, anew=arguments.anew, command=command) else 2
            whole = score(
                options,
                results=arguments.results,
                report=arguments.report,
                claimed=arguments.claimed,
                anew=arguments.anew,
                command=command,
            )
    except (ValueError, OSError) as error:  # OSError: what was to be written cannot be; finished clips are kept
        print(f"test.py: error: {error}", file=sys.stderr)
        return 2
    return 0 if whole else 2


if __name__ == "__main__":
    sys.exit(main())
