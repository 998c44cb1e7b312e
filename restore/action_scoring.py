"""What test.py does with labelled clips: every network of an options file on every test set, by its protocol.

Everything a run writes is in results/<name>/: <set>.json (all of it), <set>.txt (the tables), <set>_classes.csv and
<set>_clips.csv, and the guesses of finished clips in <set>/, with which an interrupted run continues.
"""

import datetime
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from archs import ClipClassifier
from restore import distributed
from restore.action_scores import Guess, as_method, as_text, classes_csv, clips_csv, guesses, labels_of
from restore.action_sets import ACTION_TEST_SETS
from restore.backbone_weights import load_classifier
from restore.checkpoint import replacing
from restore.cost import count_gmac, count_parameters
from restore.device import pick_device, resolve_precision
from restore.labelled_clips import ActionViews, LabelledClip
from restore.log import append_json
from restore.memory import keep_freed_memory
from restore.options import OptionError, Options, construct


@dataclass(frozen=True)
class Scored:
    """A network to score: its name in tables, and what its file is."""

    name: str
    network: ClipClassifier
    names: tuple[str, ...] | None  # of its classes
    source: str


def is_of_labels(options: Options) -> bool:
    """Whether the test sets are labelled clips; `OptionError` where some are and some are not."""
    kinds = {section.type in ACTION_TEST_SETS for section in options.test_sets.values()}
    if len(kinds) > 1:
        raise OptionError("datasets: labelled clips and clips to restore are scored apart: use two options files")
    return kinds == {True}


def score_classifiers(options: Options, *, anew: bool = False, command: str = "") -> bool:
    """Score every network on every test set; whether every clip could be scored.

    Raises ValueError for what cannot be begun. What is wrong with single clips is told, and the others go on.
    """
    keep_freed_memory()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if not options.networks:
        raise OptionError("networks: name files of weights, e.g. experiments/<name>/models/net_g_<n>.safetensors")
    device = pick_device(options.device)
    precision = resolve_precision(options.val.precision, device)
    sections = options.test_sets.items()
    sets = {name: construct(ACTION_TEST_SETS, section, f"datasets.{name}") for name, section in sections}
    networks = [_loaded(name, options, device) for name in options.networks]
    if len({scored.name for scored in networks}) < len(networks):
        raise OptionError("networks: two files have one name; rename one")
    labels = {
        (name, scored.name): _labels(name, test_set, scored) for name, test_set in sets.items() for scored in networks
    }
    whole = True
    for name, test_set in sets.items():
        run = _SetRun(Path("results") / options.name, name, test_set, precision, anew=anew)
        methods = [run.method(scored, labels[name, scored.name]) for scored in networks]
        whole = whole and not run.failed
        if distributed.is_main():
            run.finish([method for method in methods if method is not None], command)
    return whole


def _loaded(name: str, options: Options, device: torch.device) -> Scored:
    section = options.network_g.describe() if options.network_g is not None else None
    network, names = load_classifier(name, section)
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
    return Scored(Path(name).stem, network.to(device), names, f"{Path(name).name} {digest}")


def _labels(where: str, test_set: ActionViews, scored: Scored) -> dict[int, int]:
    try:
        scored.network.check_clips(test_set.num_frame, test_set.size)
        return labels_of(test_set, scored.network, scored.names)
    except ValueError as error:
        raise OptionError(f"datasets.{where}: {scored.name}: {error}") from error


class _SetRun:
    """One test set: its clips are shared among processes, finished ones are loaded."""

    def __init__(self, folder: Path, name: str, test_set: ActionViews, precision: str, *, anew: bool) -> None:
        self.folder, self.name, self.test_set, self.precision, self.anew = folder, name, test_set, precision, anew
        self.failed: dict[str, str] = {}  # clips that could not be read, and why

    def method(self, scored: Scored, labels: Mapping[int, int]) -> dict[str, Any] | None:
        """A network's part of the record; None where no clip could be scored."""
        saved = _Saved(self.folder / self.name / f"{scored.name}.jsonl", self._fingerprint(scored))
        known = {} if self.anew else saved.load()
        distributed.wait()  # all have read what is known before any process begins anew
        if distributed.is_main():
            saved.begin(known.values())
        distributed.wait()
        left = [clip for clip in distributed.share(self.test_set.found) if clip.name not in known]
        found = [guess for part in distributed.gather(list(self._new(scored, left, labels, saved))) for guess in part]
        self.failed = {key: why for part in distributed.gather(self.failed) for key, why in part.items()}
        by_name = {**known, **{guess.clip: guess for guess in found}}
        guessed = [by_name[clip.name] for clip in self.test_set.found if clip.name in by_name]
        if not guessed:
            return None
        size = self.test_set.size
        costs = {
            "parameters": count_parameters(scored.network),
            "gmac": count_gmac(scored.network, self.test_set.num_frame, size, size),
            "file": scored.source,
        }
        return as_method(scored.name, guessed, self._class_names(scored), costs)

    def finish(self, methods: Sequence[Mapping[str, Any]], command: str) -> None:
        """Print the tables and write the record."""
        if not methods:
            return
        test_set = self.test_set
        sizes = Counter(clip.label for clip in test_set.found)
        record = {
            "set": self.name,
            "title": (type(test_set).__doc__ or "").partition("\n")[0],
            "protocol": f"{test_set.protocol}; {len(test_set):,} clips of {len(sizes):,} classes, {self.precision}",
            "views": {"clips": test_set.clips, "crops": test_set.crops, "average": test_set.average,
                      "sampling": test_set.sampling, "num_frame": test_set.num_frame, "interval": test_set.interval,
                      "size": test_set.size, "short_side": test_set.short_side},
            "chance": 100 * max(sizes.values()) / len(test_set),
            "command": command,
            "date": datetime.date.today().isoformat(),
            "version": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
            "left_out": [{"clip": clip, "reason": reason} for clip, reason in self.failed.items()],
            "methods": list(methods),
        }  # fmt: skip
        text = as_text(record)
        print(text, flush=True)
        for ending, content in (
            (".json", json.dumps(record, indent=1)),
            (".txt", text + "\n"),
            ("_classes.csv", classes_csv(record)),
            ("_clips.csv", clips_csv(record)),
        ):
            with replacing(self.folder / f"{self.name}{ending}") as temporary:
                temporary.write_text(content, encoding="utf-8")

    def _new(
        self, scored: Scored, clips: Sequence[LabelledClip], labels: Mapping[int, int], saved: "_Saved"
    ) -> Iterator[Guess]:
        for clip, guess in guesses(scored.network, self.test_set, clips, labels, self.precision):
            if isinstance(guess, Guess):
                saved.add(guess)
                yield guess
            elif clip.name not in self.failed:
                self.failed[clip.name] = str(guess)
                print(f"test.py: error: {guess}", file=sys.stderr)

    def _class_names(self, scored: Scored) -> Sequence[str]:
        if scored.names is not None:
            return scored.names
        if self.test_set.names is not None and len(self.test_set.names) == scored.network.classes:
            return self.test_set.names
        return [str(number) for number in range(scored.network.classes)]

    def _fingerprint(self, scored: Scored) -> dict[str, Any]:
        """Everything that a clip's guess depends on, but for what is in the clip."""
        clips = "\n".join(f"{clip.name} {clip.label} {clip.source}" for clip in self.test_set.found)
        return {
            "protocol": self.test_set.protocol,
            "clips": hashlib.sha256(clips.encode()).hexdigest(),
            "network": scored.source,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class _Saved:
    """Guesses of finished clips in a file, one a line below the ``fingerprint`` that they count for."""

    path: Path
    fingerprint: Mapping[str, Any]

    def load(self) -> dict[str, Guess]:
        """By the clip's name; none where the file is for something else."""
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != self.fingerprint:
                return {}
        except (OSError, ValueError):
            return {}  # not there yet, or cut off by a kill
        found = {}
        for line in lines:
            try:
                guess = Guess(**json.loads(line))
            except ValueError:
                continue  # the last one, cut off by a kill
            found[guess.clip] = guess
        return found

    def begin(self, known: Iterable[Guess]) -> None:
        """A file for this fingerprint with what is known, without lines that a kill has cut off."""
        lines = [self.fingerprint, *(asdict(guess) for guess in known)]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def add(self, guess: Guess) -> None:
        """Keep the guess of a finished clip."""
        append_json(self.path, asdict(guess))
