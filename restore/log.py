"""What a run says: lines on the console and in a file, one JSON object a record for programs."""

import json
import logging
import sys
from pathlib import Path
from typing import Any


def console_logger(name: str = "restore", *, file: Path | None = None, quiet: bool = False) -> logging.Logger:
    """The run's logger: to stdout unless ``quiet``, and appended to ``file`` if given. Calling again replaces it."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    form = logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [] if quiet else [logging.StreamHandler(sys.stdout)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one record as a line of JSON; a reader never sees half a line longer than one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2 days, 3:04:05``."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' if days > 1 else ''}, {clock}" if days else clock
