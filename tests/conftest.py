"""Shapes and types in the signatures of archs and restore are enforced while the suite runs; shared fixtures."""

import logging
import os
from collections.abc import Callable
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

from archs import ARCHS, STDAN  # noqa: E402
from restore import checkpoint, manifest  # noqa: E402


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
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder of shipped models of its own, and what puts a small network into it: ``ship(name, arguments, **info)``.

    ``arguments`` are a constructor's, with ``type``, a STDAN's without.
    """
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "WEIGHTS", folder)

    def put(name: str, arguments: dict[str, Any], **info: Any) -> Path:
        torch.manual_seed(0)
        description = {"type": "stdan", **arguments}
        network = ARCHS[description["type"]](**{key: value for key, value in description.items() if key != "type"})
        checkpoint.save_network(folder / f"{name}.safetensors", network, description, **info)
        (folder / manifest.MANIFEST).write_text(manifest.written(folder, "*.safetensors"))
        return folder / f"{name}.safetensors"

    return put


@pytest.fixture
def options_file(tmp_path: Path) -> Path:
    """Options of a training run of seconds."""
    path = tmp_path / "tiny.yml"
    path.write_text(runs.OPTIONS)
    return path
