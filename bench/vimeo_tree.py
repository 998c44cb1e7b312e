"""A small tree of Vimeo-90K's shape from any folder of clips: python -m bench.vimeo_tree CLIPS OUT.

Septuplets of neighbouring frames as sequences/00001/0001/im1.png .. im7.png, one folder of sequences for each clip, and
sep_trainlist.txt: what options files for Vimeo-90K read, where the real set (82 GB) is not at hand. Frames keep their
size, which the real set's 448x256 is not.

    python -m bench.vimeo_tree CLIPS datasets/vimeo90k
    python train.py -opt options/stdan_freq.yml
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from restore.trees import find_clips
from restore.writers import write_image

LENGTH = 7


def septuplets(frames: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of seven frames, none twice; a shorter rest is left."""
    rest = iter(frames)
    while len(group := list(islice(rest, LENGTH))) == LENGTH:
        yield group


def main() -> None:
    """Write the tree."""
    parser = argparse.ArgumentParser(description="A small tree of Vimeo-90K's shape.")
    parser.add_argument("clips", help="folder of videos or of folders of frames")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--of-each", type=int, default=4, metavar="N", help="septuplets of each clip, from its start")
    arguments = parser.parse_args()
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty: name a new folder")
    names = []
    for i, clip in enumerate(find_clips(arguments.clips), start=1):
        for j, group in enumerate(islice(septuplets(clip), arguments.of_each), start=1):
            names.append(f"{i:05d}/{j:04d}")
            folder = arguments.out / "sequences" / names[-1]
            folder.mkdir(parents=True)
            for k, frame in enumerate(group, start=1):
                write_image(folder / f"im{k}.png", frame)
    (arguments.out / "sep_trainlist.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    print(f"written: {arguments.out}, {len(names)} septuplets")


if __name__ == "__main__":
    main()
