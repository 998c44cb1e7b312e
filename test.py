"""Score networks on ground-truth clips: python test.py -opt options/test_vid4.yml [--set networks=[my.safetensors]]."""

import argparse
import json
import sys
from pathlib import Path

from restore.options import Options, load_options


def main(argv: list[str] | None = None) -> int:
    """Read the options, score every test set, print tables; 2 where something was bad, with one line for each."""
    parser = argparse.ArgumentParser(description="Score networks by the protocol that an options file names.")
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE", help="options file, e.g. options/test_vid4.yml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    arguments = parser.parse_args(argv)
    try:
        return score(load_options(arguments.opt, arguments.set))
    except ValueError as error:
        print(f"test.py: error: {error}", file=sys.stderr)
        return 2


def score(options: Options) -> int:
    """Score all that ``options`` name; the figures are printed and written to results/<name>/."""
    from restore import evaluation  # heavy: after the options are known to be good
    from restore.checkpoint import load_network, replacing
    from restore.device import pick_device
    from restore.memory import keep_freed_memory
    from restore.options import OptionError, construct

    keep_freed_memory()
    device = pick_device(options.device)
    methods: dict[str, evaluation.Restorer] = {}
    if options.baseline:
        methods[evaluation.BASELINE] = evaluation.bicubic_average
    for name in options.networks:
        network = load_network(name, device=device)
        methods[Path(name).stem] = evaluation.network_restorer(
            network, device, tile=options.val.tile, precision=options.val.precision
        )
    if not methods or not options.test_sets:
        raise OptionError("nothing to score: give networks (or baseline: true) and a data set, e.g. datasets.test")
    bad = False
    folder = Path("results") / options.name
    for where, section in options.test_sets.items():
        clips = construct(evaluation.TEST_SETS, section, f"datasets.{where}")
        print(f"{where}: {evaluation.PROTOCOL.format(scale=options.scale)}", flush=True)
        scores = []
        images = folder / "images" if options.val.save_img else None
        for clip, result in evaluation.evaluate(clips, methods, scale=options.scale, images=images):
            if isinstance(result, ValueError):
                bad = True
                print(f"test.py: error: {clip}: {result}", file=sys.stderr)
                continue
            scores += result
            print(f"{clip}: " + ", ".join(f"{s.method} {s.mean('psnr'):.3f} dB {s.seconds:.0f} s" for s in result))
        if scores:
            print(evaluation.table(scores), flush=True)
            with replacing(folder / f"{where}.json") as temporary:
                temporary.write_text(json.dumps(evaluation.as_record(scores, options.scale), indent=1))
    return 2 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
