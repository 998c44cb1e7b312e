"""The hashes of shipped files: SHA256SUMS beside them, as `sha256sum -c SHA256SUMS` reads it.

They tell a damaged or altered file from the one that was measured; who can write there can change both.
"""

import hashlib
from pathlib import Path

MANIFEST = "SHA256SUMS"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(folder: Path) -> dict[str, str]:
    """Hashes by the names of files; ValueError where the manifest is missing or is none."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({type(error).__name__})") from error
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise ValueError(f"{folder / MANIFEST}: has a line that is not a hash and a name")
    return {name.removeprefix("*"): digest for digest, name in pairs}


def fault(path: Path) -> str | None:
    """Why a file is not the one that its folder's manifest has; None where it is."""
    try:
        expected = recorded(path.parent).get(path.name)
    except ValueError as error:
        return str(error)
    if expected is None:
        return f"{MANIFEST} beside it does not name it"
    return None if sha256(path) == expected else f"damaged or altered: its hash is not the one in {MANIFEST}"


def written(folder: Path, pattern: str) -> str:
    """The text of the manifest for the files in a folder that match, in order."""
    return "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob(pattern)))
