"""What classifiers make of labelled clips: the mean over views, top-1 and top-5, classes, confusions, the record."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from archs import ClipClassifier
from restore.action_lists import same_classes
from restore.device import autocast
from restore.labelled_clips import ActionViews, LabelledClip
from restore.tables import aligned, written

BEST = 5
SHOWN = 10  # classes and confusions on the console; files have all

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Guess:
    """The best classes of one clip, best first, the share or logit of the first, and the seconds that it took."""

    clip: str
    label: int
    ranked: list[int]
    score: float
    seconds: float


def labels_of(test_set: ActionViews, network: ClipClassifier, names: Sequence[str] | None) -> dict[int, int]:
    """From the labels of a set to the classes of ``network``, by ``names`` where both have them, else as they are.

    ValueError where classes of the set are not those of the network.
    """
    if names is not None and test_set.names is not None:
        return same_classes({name: number for number, name in enumerate(names)}, test_set.names)
    labels = {clip.label for clip in test_set.found}
    highest = len(test_set.names) - 1 if test_set.names is not None else max(labels)
    if highest >= network.classes:
        raise ValueError(f"label {highest}, but the network has {network.classes} classes, from 0 on")
    return {label: label for label in labels}


def guesses(
    network: ClipClassifier, test_set: ActionViews, clips: Iterable[LabelledClip], labels: Mapping[int, int],
    precision: str,
) -> Iterator[tuple[LabelledClip, Guess | ValueError]]:  # fmt: skip
    """Clip after clip: what ``network``, which is in eval mode, makes of it, or what is wrong; the others go on."""
    for clip in clips:
        try:
            views = test_set.views(clip)
        except ValueError as error:
            yield clip, error
            continue
        started = time.perf_counter()
        scores = mean_scores(network, views, test_set.average, precision)
        seconds = time.perf_counter() - started
        best = scores.topk(min(BEST, len(scores)))
        yield clip, Guess(clip.name, labels[clip.label], best.indices.tolist(), best.values[0].item(), seconds)


@torch.no_grad()
def mean_scores(
    network: ClipClassifier, views: Float[Tensor, "clips crops t 3 h w"], average: str, precision: str
) -> Float[Tensor, " classes"]:
    """The mean over views of softmax or of logits; the crops of one stretch of time are one batch."""
    device = next(network.parameters()).device
    with autocast(device, precision):
        logits = torch.cat([network(crops.to(device)).float() for crops in views])
    return (logits.softmax(1) if average == "softmax" else logits).mean(0).cpu()


# ---- figures


def figures(found: Sequence[Guess]) -> dict[str, float]:
    """Shares in percent: the true class first, the true class among the five best, and the first as the mean over
    classes; NaN where there is no clip."""
    if not found:
        return dict.fromkeys(("top1", "top5", "mean_class"), float("nan"))
    shares = {
        "top1": fmean(guess.ranked[0] == guess.label for guess in found),
        "top5": fmean(guess.label in guess.ranked for guess in found),
        "mean_class": fmean(row["top1"] / 100 for row in by_class(found)),
    }
    return {name: 100 * share for name, share in shares.items()}


def by_class(found: Sequence[Guess]) -> list[dict[str, Any]]:
    """Of every class that occurs its number, clips, and top-1 in percent."""
    clips = Counter(guess.label for guess in found)
    right = Counter(guess.label for guess in found if guess.ranked[0] == guess.label)
    shares = {label: 100 * right[label] / count for label, count in clips.items()}
    return [{"class": label, "clips": clips[label], "top1": shares[label]} for label in sorted(clips)]


def confusions(found: Sequence[Guess]) -> list[dict[str, Any]]:
    """What was taken for what, most frequent first."""
    wrong = Counter((guess.label, guess.ranked[0]) for guess in found if guess.ranked[0] != guess.label)
    return [{"class": label, "taken_for": other, "clips": count} for (label, other), count in wrong.most_common()]


def as_method(name: str, found: Sequence[Guess], names: Sequence[str], costs: Mapping[str, Any]) -> dict[str, Any]:
    """A network in the record: figures, costs, classes and confusions by name, every clip."""
    named = [
        [{**row, **{key: names[row[key]] for key in ("class", "taken_for") if key in row}} for row in rows]
        for rows in (by_class(found), confusions(found))
    ]
    return {
        "name": name,
        **costs,
        "ms_per_clip": 1000 * fmean(guess.seconds for guess in found),
        "figures": figures(found),
        "classes": named[0],
        "confusions": named[1],
        "clips": [
            {**asdict(guess), "label": names[guess.label], "ranked": [names[i] for i in guess.ranked]}
            for guess in found
        ],
    }  # fmt: skip


# ---- tables


def as_text(record: Record) -> str:
    """Figures of every network, then its worst classes and most frequent confusions."""
    heads = ("network", "top-1 %", "top-5 %", "mean of classes %", "parameters", "GMAC/view", "ms/clip")
    rows: list[tuple[str, ...]] = [heads]
    for method in record["methods"]:
        shares = [f"{method['figures'][key]:.2f}" for key in ("top1", "top5", "mean_class")]
        spent = [f"{method['parameters']:,}", f"{method['gmac']:.3g}", f"{method['ms_per_clip']:.1f}"]
        rows.append((method["name"], *shares, *spent))
    rows.append(("largest class", f"{record['chance']:.2f}", *[""] * 5))
    lines = [f"{record['set']}: {record['protocol']}", aligned(rows)]
    for method in record["methods"]:
        worst = sorted(method["classes"], key=lambda row: row["top1"])[:SHOWN]
        told = [f"{row['class']} {row['top1']:.1f} % of {row['clips']}" for row in worst]
        taken = [f"{row['class']} -> {row['taken_for']} ({row['clips']})" for row in method["confusions"][:SHOWN]]
        lines += ["", f"{method['name']}, classes, worst first:", *(f"  {text}" for text in told)]
        lines += [f"{method['name']}, confusions, most frequent first:", *(f"  {text}" for text in taken or ["none"])]
    return "\n".join(lines)


def classes_csv(record: Record) -> str:
    """A row for every network and class, and one for all clips."""
    rows: list[list[Any]] = [["set", "network", "class", "clips", "top1", "top5"]]
    for method in record["methods"]:
        place, values = [record["set"], method["name"]], method["figures"]
        rows += [[*place, row["class"], row["clips"], row["top1"], ""] for row in method["classes"]]
        rows.append([*place, "all", len(method["clips"]), values["top1"], values["top5"]])
    return written(rows)


def clips_csv(record: Record) -> str:
    """A row for every network and clip: its class, and the best guesses."""
    rows: list[list[Any]] = [["set", "network", "clip", "class", "score", *(f"guess{i + 1}" for i in range(BEST))]]
    for method in record["methods"]:
        for clip in method["clips"]:
            rows.append([record["set"], method["name"], clip["clip"], clip["label"], clip["score"], *clip["ranked"]])
    return written(rows)
