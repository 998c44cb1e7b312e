"""The card of a shipped model, a page of Markdown made of its metadata alone: python -m bench.model_card [NAME ...]"""

import sys
import textwrap
from collections.abc import Iterator

from restore.checkpoint import shipped_models
from restore.models import TASKS, Model, default_model, described

WIDTH = 120


def card(model: Model) -> str:
    """What the model is for, its figures, how it was made, its limits and its licence."""
    return "\n".join(_lines(model)) + "\n"


def _lines(model: Model) -> Iterator[str]:
    info = model.info
    default = " (the default)" if model.name == default_model(model.task) else ""
    yield from (f"# {model.name}", "", *_wrapped(f"{_sentence(info['summary'])}"), "")
    yield from ("```bash", f"python -m restore INPUT -o OUTPUT -m {model.name}", "```", "")
    yield from ("| | |", "|---|---|")
    yield f"| task | `{model.task}`{default}: {TASKS[model.task].what} |"
    yield f"| factors | x{model.scale} in space, x{model.time_scale} in time |"
    yield f"| parameters | {model.parameters:,} |"
    yield f"| file | `{model.path.name}`, {model.path.stat().st_size / 1e6:.2f} MB; its hash is in `SHA256SUMS` |"
    if info.get("speed"):
        yield f"| speed | {info['speed']} |"
    yield f"| licence | {info['licence']} |"
    yield from ("", "## Figures", "", *_figures(model), "")
    made = f"`{info['command']}` (`{info['options']}`): {info['trained']}"
    yield from ("## How it was made", "", *_wrapped(made), "")
    if info.get("validation"):
        yield from (*_wrapped(f"Validation at iteration {info['iteration']:,}: {_validation(info['validation'])}."), "")
    yield from (*_wrapped(f"Training data: {_sentence(info['data'])}"), "")
    yield from ("## What it is not good at", "")
    for limit in info["limits"]:
        yield from _wrapped(limit, first="- ", rest="  ")


def _figures(model: Model) -> Iterator[str]:
    yield from ("| | PSNR dB / SSIM | baseline | protocol, command |", "|---|---|---|---|")
    for score in model.info["scores"]:
        base = "-"
        if score.get("baseline"):
            base = f"{score['baseline']}: {score['baseline_psnr']:.3f} / {score['baseline_ssim']:.4f}"
        figures = f"{score['psnr']:.3f} / {score['ssim']:.4f}"
        yield f"| {score['set']} | {figures} | {base} | {score['protocol']}: `{score['command']}` |"


def _validation(figures: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{name}: {', '.join(f'{metric} {value:.4g}' for metric, value in values.items())}"
        for name, values in figures.items()
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    for shown in sys.argv[1:] or shipped_models():
        print(card(described(shown)))
