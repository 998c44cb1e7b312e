"""Shapes and types in the signatures of archs and restore are enforced while the suite runs; shared fixtures."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():  # Triton asks when it is first imported, which Dynamo does, too
    os.environ["TRITON_INTERPRET"] = "1"
install_import_hook(["archs", "restore"], "typecheck.check")

import runs  # noqa: E402 - after the hook
from tiny import COMPACT  # noqa: E402

from archs import STDAN  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    """Threads that wait for each other on a busy machine take longer than work as small as a test's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """A run's log goes to the stream that pytest captures in that test, which is closed after it."""
    yield
    logger = logging.getLogger("restore")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def tiny_stdan() -> tuple[STDAN, dict[str, Any]]:
    """A network of a few thousand parameters and the description its file carries."""
    torch.manual_seed(0)
    return STDAN(**COMPACT).eval(), {"type": "stdan", **COMPACT}


@pytest.fixture
def options_file(tmp_path: Path) -> Path:
    """Options of a training run of seconds."""
    path = tmp_path / "tiny.yml"
    path.write_text(runs.OPTIONS)
    return path
