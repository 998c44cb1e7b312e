"""C kernels of this package: built on first use with the machine's C compiler, kept in the user's cache, optional.

The kernels are plain C behind ctypes, so they build in a second and need no headers of PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=Callable[..., object])


def constant(choice: Answer) -> Answer:
    """Let `torch.compile` take what a choice gives as it is instead of tracing how it is made.

    What torch.compiler.assume_constant_result does, which would import Dynamo: a second at every start.
    """
    choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return choice


def load(name: str, sources: list[Path], instead: str, variable: str | None = None) -> ctypes.CDLL | None:
    """The library made of ``sources`` (the first is compiled), or None after one log line where it cannot be built.

    ``instead`` ends that line: what happens without the library. The environment variable ``variable`` may forbid it by
    "torch"; "auto" is as if it were not set, and ValueError for another word.
    """
    if variable and (word := os.environ.get(variable, "auto")) != "auto":
        if word != "torch":
            raise ValueError(f"{variable}={word}: there is auto (the compiled kernel where one can be built) and torch")
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info("no C compiler found: %s", instead)
        return None
    try:
        return ctypes.CDLL(str(_build(name, sources, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.info("the %s kernel did not build (%s): %s", name, reason.strip()[:200], instead)
        return None


def _build(name: str, sources: list[Path], compiler: str) -> Path:
    """Compile into the user's cache under a name that changes with source, flags and processor."""
    texts = (source.read_text() for source in sources)
    identity = "\0".join([*texts, *FLAGS, compiler, platform.machine(), _processor()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restore"
    library = cache / f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, str(sources[0]), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # atomic: several processes may build at once
    return library


def _processor() -> str:
    """The processor's instruction sets: a home folder shared by unlike machines must not share the library."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    return flags[0] if flags else platform.processor()
