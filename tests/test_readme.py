"""The README's map names every file, and no other."""

import re

from tiny import ROOT


def mapped() -> list[str]:
    """The paths of the map, in its order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## What is where\n\n```\n(.*?)```", text, re.DOTALL)
    return [line.split()[0] for line in block.splitlines() if line]


def test_every_module_and_options_file_is_on_the_map():
    found = [path for folder in ("archs", "restore", "bench") for path in (ROOT / folder).rglob("*.py")]
    found += [*(ROOT / "options").rglob("*.*"), ROOT / "train.py", ROOT / "test.py"]
    there = {str(path.relative_to(ROOT)) for path in found}
    unsaid = {"restore/__init__.py", "archs/layers/__init__.py", "archs/action/__init__.py", "bench/__init__.py"}
    known = mapped()
    patterns = [entry.removesuffix("*") for entry in known if entry.endswith(("*", "/"))]
    missing = {path for path in there - unsaid - set(known) if not any(path.startswith(p) for p in patterns)}
    assert not missing


def test_everything_on_the_map_exists_once():
    known = mapped()
    assert len(known) == len(set(known))
    assert all(any(ROOT.glob(entry.rstrip("/"))) for entry in known), known
