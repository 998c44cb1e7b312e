"""The flags of `python -m restore`."""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from restore.budget import parse_bytes
from restore.checkpoint import DEFAULT_MODEL
from restore.device import PRECISIONS
from restore.models import TASKS

_SUFFIXES = ("png", "jpg", "webp", "tif", "mp4", "mkv", "mov", "webm")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m restore --help lists all flags")


def command_parser() -> argparse.ArgumentParser:
    """A parser that raises ValueError, in one line, where argparse would print its usage and exit."""
    parser = _Parser(
        prog="python -m restore",
        usage="%(prog)s INPUT -o OUTPUT [flags]",
        description="Restore a video file, a folder of frames, or a folder of these.",
        epilog="Frames in a folder keep their names (inserted: 0004_5 after 0004). A video keeps duration and audio.",
        allow_abbrev=False,
    )
    parser.add_argument("positional", nargs="?", type=Path, metavar="INPUT", help="video, folder of frames or of clips")
    parser.add_argument("-i", "--input", type=Path, metavar="INPUT", help="the same as a flag")
    parser.add_argument("-o", "--output", type=Path, help="folder for frames, or a video such as out.mp4")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    parser.add_argument("--list-models", action="store_true", help="list the models that ship, and stop")
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="pictures of what the network sees in each clip's first window"
    )
    parser.add_argument("--no-progress", action="store_true", help="a line a clip instead of a bar")
    _add_network_flags(parser.add_argument_group("network"))
    _add_frame_flags(parser.add_argument_group("frames"))
    _add_video_flags(parser.add_argument_group("video"))
    return parser


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m", "--model", "--weights", help=f"name of a shipped model or file (that of --task, else {DEFAULT_MODEL})"
    )
    group.add_argument("--task", choices=TASKS, metavar="TASK", help=f"take the shipped model for {', '.join(TASKS)}")
    group.add_argument("--slowmo", type=_positive, metavar="{1,2}", help="frames out per frame in (all it can)")
    group.add_argument(
        "--max-memory", type=_memory, metavar="SIZE", help="e.g. 4G: choose window and tile to stay below it"
    )
    group.add_argument("-t", "--tile", type=_natural, default=0, help="side of tiles in input pixels; 0: whole frames")
    group.add_argument("--tile-overlap", type=_natural, default=16, help="pixels that tiles share (%(default)s)")
    group.add_argument("--window", type=_positive, help="input frames at once (4)")
    group.add_argument("--temporal-overlap", type=_natural, default=1, help="frames windows share (%(default)s)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (%(default)s)")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="(%(default)s)")
    precision.add_argument("--half", dest="precision", action="store_const", const="fp16", help="--precision fp16")
    precision.add_argument("--fp32", dest="precision", action="store_const", const="fp32", help="--precision fp32")


def _add_frame_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start", type=_natural, default=0, help="first frame to restore, counted from 0")
    group.add_argument("--frames", type=_positive, help="how many to restore (all)")
    group.add_argument(
        "--suffix",
        type=lambda text: text.removeprefix(".").lower(),
        choices=_SUFFIXES,
        help="format of the files in the output folder: images (png), or a video for each clip",
    )
    group.add_argument("--bits", type=int, choices=(8, 16), help="bits a channel, 16 for png and tif (8)")


def _add_video_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--fps", type=_rate, help="frame rate, e.g. 25 or 30000/1001 (the input's times --slowmo)")
    group.add_argument("--codec", help="encoder of FFmpeg (libx264; libvpx-vp9 in webm)")
    group.add_argument("--crf", type=_natural, help="quality, 0 is the best (18)")
    group.add_argument("--preset", help="the encoder's preset, e.g. slow")
    group.add_argument("--pix-fmt", help="e.g. yuv420p10le (yuv420p)")
    group.add_argument("--no-audio", action="store_true", help="leave the audio out")
    group.add_argument("--stretch-audio", action="store_true", help="fit the audio to a duration changed by --fps")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _memory(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate such as 25, 23.976 or 30000/1001")
    return rate
