"""What test.py does: every method of an options file on every test set, with costs, saved figures, tables and report.

Everything a run writes is in results/<name>/: <set>.json, .csv, _frames.csv and .tex, figures of finished clips in
<set>/ (an interrupted run continues with them), and images/<set>/<method>/<clip>/ where they are asked for.
"""

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from restore import distributed
from restore.checkpoint import replacing
from restore.clip_sources import TrainingClip
from restore.device import pick_device
from restore.evaluation import TRUTH, check_methods, chosen_metrics, evaluate, save_truth
from restore.memory import keep_freed_memory, peak_during_mb
from restore.methods import Method, baseline, folder_method, load_method, names_of
from restore.options import OptionError, Options, construct
from restore.scores import ClipScore, SavedScores, as_record, claim_explained, infinite_clips
from restore.tables import as_csv, as_latex, as_text, frames_csv
from restore.test_sets import TEST_SETS, TestClips


def score(
    options: Options,
    *,
    results: Sequence[str] = (),
    report: Path | None = None,
    claimed: float | None = None,
    anew: bool = False,
    command: str = "",
) -> bool:
    """Score everything that ``options`` and ``results`` ([NAME=]FOLDER) name; whether all of it could be.

    ``claimed`` is a PSNR whose convention is looked for.

    Raises ValueError for what cannot be begun. What is wrong with single clips is told, and the others go on.
    """
    keep_freed_memory()
    device = pick_device(options.device)
    folders = names_of(results)
    if not options.test_sets or not (options.baseline or options.networks or folders):
        raise OptionError("nothing to score: give networks (or baseline: true) and a data set, e.g. datasets.test")
    sets = {name: construct(TEST_SETS, section, f"datasets.{name}") for name, section in options.test_sets.items()}
    networks = [
        load_method(name, device, tile=options.val.tile, precision=options.val.precision) for name in options.networks
    ]
    records, whole = [], True
    for name, test_set in sets.items():
        lengths = {clip.name: clip.count for clip in test_set.found}
        others = [folder_method(other, root, lengths) for other, root in folders.items()]
        methods = [*([baseline(test_set.protocol)] if options.baseline else []), *networks, *others]
        check_methods(name, test_set.protocol, methods)
        images = options.val.save_img or report is not None
        run = SetRun(options, name, test_set, methods, images=images, claimed=claimed)
        record = run.score(anew=anew, command=command)
        whole = whole and not run.failed
        if record is not None:
            records.append(record)
    if report is not None and records:
        from restore.report import write_report

        write_report(report, records, title=options.name, command=command)
        print(f"written: {report}")
    return whole


class SetRun:
    """One test set: its clips are shared among processes, finished ones are loaded."""

    def __init__(
        self,
        options: Options,
        name: str,
        test_set: TestClips,
        methods: Sequence[Method],
        *,
        images: bool,
        claimed: float | None = None,
    ) -> None:
        self.name, self.test_set, self.methods, self.claimed = name, test_set, methods, claimed
        self.metrics = chosen_metrics(options.val.metrics, test_set.protocol)
        self.folder = Path("results") / options.name
        self.images = self.folder / "images" / name if images else None
        self.left_out: dict[str, str] = {}  # clips and why: what could not be scored, and what no mean can hold
        self.failed: dict[str, str] = {}  # of these, what could not be scored

    def score(self, *, anew: bool, command: str) -> dict[str, Any] | None:
        """The record, printed and written; None where no clip could be scored or another process has it."""
        protocol = self.test_set.protocol
        if distributed.is_main():
            print(f"{self.name}: {protocol.text}", flush=True)
        costs = self._costs()
        for clip, reason in self.test_set.left_out.items():
            self._fail(clip, reason)
        scores = [
            score for clip in distributed.share(self.test_set.found) for score in self._clip(clip, anew=anew)
        ]  # fmt: skip
        scores = [score for part in distributed.gather(scores) for score in part]
        self.failed = {key: value for part in distributed.gather(self.failed) for key, value in part.items()}
        if not scores or not distributed.is_main():
            return None
        places = [clip.name for clip in self.test_set.found], [method.name for method in self.methods]
        scores.sort(key=lambda s: (places[0].index(s.clip), places[1].index(s.method)))
        record = as_record(scores, self.metrics, costs, **self._about(scores, command))
        if self.claimed is not None:
            record["diagnosis"] += claim_explained(scores, self.claimed)
        print(as_text(record), *record["diagnosis"], sep="\n", flush=True)
        self._write(record)
        return record

    def _clip(self, clip: TrainingClip, *, anew: bool) -> list[ClipScore]:
        """Every method's figures on a clip: those of an earlier run, or measured now."""
        scores: list[ClipScore] = []
        for method in self.methods:
            saved = SavedScores(self.folder / self.name, self._fingerprint(clip, method))
            known = None if anew else saved.load(clip.name, method.name)
            if known is not None and self._has_images(clip, method.name):
                scores.append(known)
                continue
            wishes = {"images": self.images, "diagnosing": True, "conventions": self.claimed is not None}
            for _, result in evaluate([clip], self.test_set.protocol, [method], self.metrics, **wishes):  # type: ignore[arg-type]
                if isinstance(result, ValueError):
                    self._fail(clip.name, str(result))
                    continue
                saved.save(result)
                scores.append(result)
                self._tell(result)
        if self.images is not None and not self._has_images(clip, TRUTH):
            save_truth(clip, self.test_set.protocol, self.images)
        return scores

    def _fail(self, clip: str, reason: str) -> None:
        if clip not in self.failed:
            self.failed[clip] = reason
            text = reason if reason.startswith(clip) else f"{clip}: {reason}"
            print(f"test.py: error: {text}", file=sys.stderr)

    def _tell(self, score: ClipScore) -> None:
        figures = [f"{m.label} {score.mean(name):.{m.digits}f} {m.unit}".strip() for name, m in self.metrics.items()]
        print(f"{score.clip}: {score.method}: {', '.join(figures)}, {score.seconds:.0f} s", flush=True)

    def _has_images(self, clip: TrainingClip, method: str) -> bool:
        if self.images is None:
            return True
        return len(list((self.images / method / clip.name).glob("*.png"))) == clip.count

    def _fingerprint(self, clip: TrainingClip, method: Method) -> dict[str, Any]:
        """Everything that a clip's figures depend on."""
        return {
            "protocol": self.test_set.protocol.text,
            "data": [self.test_set.dataroot_gt, self.test_set.dataroot_lq, clip.count, clip.size],
            "method": method.source,
            "metrics": {name: metric.describe() for name, metric in self.metrics.items()},
            "conventions": self.claimed is not None,
        }

    def _costs(self) -> dict[str, dict[str, Any]]:
        """What the methods cost, peak memory measured on a window of the first clip that can be read.

        It comes before anything is timed, so that caches are warm and kernels built.
        """
        costs = {method.name: method.cost() for method in self.methods}
        protocol = self.test_set.protocol
        for clip in self.test_set.found:
            try:
                window = protocol.windows(clip.count)[0]
                lq = protocol.inputs(clip, window, protocol.truth(clip, window.frames))
            except ValueError:
                continue  # is told when its turn comes
            for method in self.methods:
                if method.network is not None:
                    costs[method.name]["peak_mb"] = peak_during_mb(partial(method.restore, lq, clip.name, window))
            break
        return costs

    def _about(self, scores: Sequence[ClipScore], command: str) -> dict[str, Any]:
        protocol = self.test_set.protocol
        left_out = {**self.failed, **infinite_clips(scores)}
        return {
            "set": self.name,
            "title": self.test_set.title,
            "scale": protocol.scale,
            "time_scale": protocol.time_scale,
            "protocol": protocol.text,
            "command": command,
            "date": datetime.date.today().isoformat(),
            "version": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
            "left_out": [{"clip": clip, "reason": reason} for clip, reason in left_out.items()],
            "images": str(self.images) if self.images else None,
        }

    def _write(self, record: Mapping[str, Any]) -> None:
        for ending, text in (
            (".json", json.dumps(record, indent=1)),
            (".csv", as_csv(record)),
            ("_frames.csv", frames_csv(record)),
            (".tex", as_latex(record)),
        ):
            with replacing(self.folder / f"{self.name}{ending}") as temporary:
                temporary.write_text(text, encoding="utf-8")
