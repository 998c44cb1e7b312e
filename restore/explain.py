"""python -m restore INPUT -o OUT --explain DIR: what the parts of the network saw, as pictures and a page of them."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from restore.checkpoint import replacing
from restore.explain_pictures import Picture, pictures
from restore.explain_watch import Seen
from restore.writers import FrameFolderWriter

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ background: #181818; color: #ebebeb; font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 1540px }}
p {{ max-width: 60em }} img {{ max-width: 100%; image-rendering: pixelated }} a {{ color: #86b4ff }}
</style>
<h1>{title}</h1>
<p>{about}</p>
{sections}
</html>
"""
_SECTION = """<h2 id="{name}">{heading}</h2>
<p>{words}</p>
<a href="{name}.png"><img src="{name}.png" alt="{heading}" width="{width}" height="{height}" loading="lazy"></a>"""


def explain(seen: Seen, names: Sequence[str], folder: Path, *, title: str, size: tuple[int, int]) -> str:
    """Write the pictures of ``seen`` and index.html into ``folder``, made if missing; what is worth a line of text.

    ``names`` are those of the frames that the network gave, ``size`` is (h, w) of the input frames, which the network
    may have seen padded, or one tile of them.
    All pictures are made before any is written, each appears complete, and the page comes last. Raises ClipError or
    OSError for a folder that cannot be written.
    """
    tile = seen.padded[0] < size[0] or seen.padded[1] < size[1]
    seen = seen.cropped(*size)
    made = pictures(seen, names)
    with FrameFolderWriter(folder) as writer:
        for picture in made:
            writer.write(picture.name, picture.sheet)
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(_page(seen, names, made, title, tile), encoding="utf-8")
    leaning = seen.leaning()
    return f"{len(made)} pictures of the first {len(names)} frames in {folder}" + (f"; {leaning}" if leaning else "")


def _page(seen: Seen, names: Sequence[str], made: Sequence[Picture], title: str, tile: bool) -> str:
    assert seen.clip is not None
    frames, _, height, width = seen.clip.shape
    of = f"the top left tile of {width}x{height} px" if tile else f"{width}x{height} px"
    about = (
        f"What the network saw in its first window: {frames} input frames, {of}, of which it made {len(names)}: "
        f"{', '.join(names)}. All lengths are in input pixels."
    )
    sections = "\n".join(
        _SECTION.format(
            name=p.name, heading=p.name.replace("_", " ").capitalize(), words=escape(p.words),
            width=p.sheet.shape[2], height=p.sheet.shape[1],
        )
        for p in made
    )  # fmt: skip
    return _PAGE.format(title=escape(f"{title}: what the network saw"), about=escape(about), sections=sections)
