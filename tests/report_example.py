"""A small evaluation as the report gets it, with pictures on disk, and a page taken apart."""

from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from restore.degrade import imresize, quantize
from restore.metrics import psnr, ssim
from restore.sample import sample_clip
from restore.writers import write_image

BASELINE, NETWORK = "bicubic + average", "net"
FRAMES, HEIGHT, WIDTH = 9, 104, 152
METRICS = [
    {"name": "psnr", "label": "PSNR-Y", "unit": "dB", "higher_is_better": True, "digits": 3, "description": "Of luma."},
    {"name": "tof", "label": "tOF", "unit": "px", "higher_is_better": False, "digits": 2, "description": "Of motion."},
    {"name": "ssim", "label": "SSIM-Y", "unit": "", "higher_is_better": True, "digits": 4, "description": "Of luma."},
]


def record(images: Path, clips: tuple[str, ...] = ("first", "second")) -> dict[str, Any]:
    """The record of an evaluation that wrote its pictures to ``images``."""
    entries = [entry for i, clip in enumerate(clips) for entry in _clip(images, clip, seed=i)]
    return {
        "set": "small", "scale": 4, "time_scale": 2, "protocol": "Every second frame is the input.",
        "command": "python test.py -opt options/small.yml", "date": "2026-11-23", "version": "torch 2.13",
        "metrics": METRICS,
        "methods": [
            {"name": BASELINE, "parameters": 0, "gmac": None, "ms_per_frame": 1.5, "peak_mb": None, "source": ""},
            {"name": NETWORK, "parameters": 1016019, "gmac": 46.1, "ms_per_frame": 98.0, "peak_mb": None,
             "source": "shipped"},
        ],
        "clips": entries,
        "averages": [
            {"method": method, "which": which, "values": {"psnr": 25 + gain, "tof": 1.5 - gain, "ssim": 0.7}}
            for which in ("all", "input", "synthesised")
            for method, gain in ((BASELINE, 0.0), (NETWORK, 0.75))
        ],
        "left_out": [], "diagnosis": [], "images": str(images),
    }  # fmt: skip


def _clip(images: Path, clip: str, seed: int) -> list[dict[str, Any]]:
    truth = quantize(sample_clip(FRAMES, HEIGHT, WIDTH, seed=seed))
    low = quantize(imresize(truth, Fraction(1, 4)))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    made = {
        BASELINE: imresize(low, 4),
        NETWORK: truth + 0.02 * noise * torch.linspace(1, 2, FRAMES)[:, None, None, None],
    }
    results = {method: quantize(frames.clamp(0, 1)) for method, frames in made.items()}
    for name, frames in {**results, "truth": truth, "input": low}.items():
        folder = images / name / clip
        folder.mkdir(parents=True)
        for i, frame in enumerate(frames):
            if name != "input" or i % 2 == 0:
                write_image(folder / f"{i:08d}.png", frame)
    return [
        {"clip": clip, "method": method, "seconds": 1.0, "frames": _figures(frames, truth)}
        for method, frames in results.items()
    ]


def _figures(frames: torch.Tensor, truth: torch.Tensor) -> list[dict[str, Any]]:
    figures = zip(psnr(frames, truth).tolist(), ssim(frames, truth).tolist(), strict=True)
    return [
        {"frame": i, "synthesised": bool(i % 2), "values": {"psnr": p, "ssim": s, **({"tof": 30 / p} if i else {})}}
        for i, (p, s) in enumerate(figures)
    ]


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, text, scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attributes}))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw.append((self.cdata_elem, data))
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]
