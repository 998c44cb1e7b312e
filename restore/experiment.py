"""The folder of a training run: options, weights, training states; continuing where it stopped.

    experiments/<name>/options.yml               the resolved options
                      models/net_g_<n>.safetensors   weights to use (the moving average where there is one)
                      training_states/<n>.state      everything needed to continue exactly
                      train.log, log.jsonl

Files appear complete or not at all. A newest state that cannot be read is passed over for the one before.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from restore.checkpoint import replacing
from restore.options import OptionError, Options, as_dict
from restore.schema import parse

log = logging.getLogger("restore")

# keys that may differ when a run continues: they change what is told or how long it runs, not what is learnt
FREE = (
    *("train.total_iter", "num_threads", "device", "val", "logger", "path.experiments", "datasets.val"),
    "datasets.train.num_worker_per_gpu",
)


@dataclass(frozen=True)
class Experiment:
    """A run's folder."""

    folder: Path

    @property
    def models(self) -> Path:
        """Where weights go."""
        return self.folder / "models"

    @property
    def states(self) -> Path:
        """Where training states go."""
        return self.folder / "training_states"

    @property
    def records(self) -> Path:
        """The log for programs, one JSON object a line."""
        return self.folder / "log.jsonl"

    def claim(self, options: Options) -> None:
        """Write the resolved options, or check that they are those the folder was begun with.

        `OptionError` lists the keys that differ.
        """
        resolved, path = as_dict(options), self.folder / "options.yml"
        if path.exists():
            begun = _with_later_keys(yaml.safe_load(path.read_text(encoding="utf-8")))
            differing = [key for key in _differences(begun, resolved) if not key.startswith(FREE)]
            if differing:
                raise OptionError(
                    f"{self.folder} was begun with other options; they differ in {', '.join(differing)}. "
                    "Restore them, or choose another name to begin anew"
                )
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")

    def save_state(self, iteration: int, state: dict[str, Any], keep: int) -> None:
        """Write the state of ``iteration`` and remove all but the ``keep`` newest."""
        content = io.BytesIO()  # by way of memory, so that a full disk is an OSError as everywhere
        torch.save({"iteration": iteration, **state}, content)
        with replacing(self.states / f"{iteration:07d}.state") as temporary:
            temporary.write_bytes(content.getbuffer())
        for old in self._saved()[:-keep]:
            old.unlink()

    def latest_state(self, device: torch.device) -> dict[str, Any] | None:
        """The newest readable state, or None where nothing was saved yet."""
        for path in reversed(self._saved()):
            try:
                return torch.load(path, map_location=device, weights_only=True)
            except Exception as error:  # torch raises whatever its unpickler met in a damaged file
                log.warning("%s: damaged (%s), using the state before it", path, type(error).__name__)
        return None

    def _saved(self) -> list[Path]:
        return sorted(self.states.glob("*.state"))


def _with_later_keys(begun: dict[str, Any]) -> dict[str, Any]:
    """Options as an earlier version has written them, with the defaults of keys that there are since."""
    try:
        return as_dict(parse(Options, begun, ""))
    except OptionError:
        return begun


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Dotted keys under which two trees of plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [found for key in keys for found in _differences(a.get(key), b.get(key), f"{where}.{key}".strip("."))]
    return [] if a == b else [where]
