"""What the parts of a network see: motion, where they read, how they weigh; recorded while the network runs.

    with watching(net) as seen:
        for frame in restore_clip(net, clip): ...
    seen.shifts                                     # of the first call; None where the network has no such part

Hooks only look: results are the same bit for bit. They are gone after the network's first call, and nothing of this
costs anything where nobody watches.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from archs import VideoNet
from archs.layers.deform_attention import DeformableAttention
from archs.layers.energy_attention import FusedTarget, mean_weight_on
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.frequency_align import SpectrumGuidance
from archs.layers.motion_prior import CorrelationMotion, MiddleMotion
from archs.layers.pyramid_align import AlignLevel
from archs.layers.spectral import band_energies, hann, radial_bands, rfft2

BANDS = 8


@dataclass
class Seen:
    """One call of a network on T frames of h x w px, of which it makes U; float32 on the CPU.

    Vectors are (dy, dx) in input pixels. What the network does not have is None or empty.
    """

    clip: Float[Tensor, "t 3 h w"] | None = None  # what went in
    restored: Float[Tensor, "u 3 h w"] | None = None  # what came out, averaged to the size of the input
    matched: Float[Tensor, "gaps 2 h w"] | None = None  # motion of the content to the next frame, by block matching
    shifts: Float[Tensor, "gaps 2 h w"] | None = None  # the same by phase correlation, after block matching if any
    confidence: Float[Tensor, "gaps 1 h w"] | None = None  # of these, 0..1
    aligned: dict[str, Float[Tensor, "gaps 2 h w"]] = field(default_factory=dict)  # where LSTFI reads: mean over taps
    read: list[Float[Tensor, "_ 2 h w"]] = field(default_factory=list)  # where STDFA reads the sources of each target
    fused: list[FusedTarget] = field(default_factory=list)  # and what these count
    feature_energies: Float[Tensor, "u k"] | None = None  # of what STDFA is given, in radial bands
    padded: tuple[int, int] = (0, 0)  # h and w of what spectra are of: the call, or the network's grid

    @property
    def step(self) -> int:
        """Frames out per frame in."""
        assert self.clip is not None and self.restored is not None
        return (len(self.restored) - 1) // max(len(self.clip) - 1, 1)

    def leaning(self) -> str | None:
        """The mean weight 0..1 on interpolated frames in words; None without weights or interpolated frames."""
        if not self.fused or self.step == 1:
            return None
        assert self.restored is not None
        between = [i for i in range(len(self.restored)) if i % self.step]
        weight = f"mean weight on interpolated frames {mean_weight_on(between, self.fused):.3f}"
        shares = [sum(i in between for i in target.sources) / len(target.sources) for target in self.fused]
        if set(shares) <= {0, 1}:
            return f"{weight}, given by which frames are sources: no frame has sources of both kinds"
        return f"{weight}, where equal weights would give {sum(shares) / len(shares):.3f}"

    def cropped(self, height: int, width: int) -> "Seen":
        """Without what was padded at the bottom and right; spectra stay those of the padded frames."""

        def crop(x: Tensor) -> Tensor:
            return x[..., :height, :width]

        return replace(
            self,
            clip=None if self.clip is None else crop(self.clip),
            restored=None if self.restored is None else crop(self.restored),
            matched=None if self.matched is None else crop(self.matched),
            shifts=None if self.shifts is None else crop(self.shifts),
            confidence=None if self.confidence is None else crop(self.confidence),
            aligned={name: crop(x) for name, x in self.aligned.items()},
            read=[crop(x) for x in self.read],
            fused=[target._replace(frame=crop(target.frame)) for target in self.fused],
        )


@contextmanager
def watching(net: VideoNet) -> Iterator[Seen]:
    """Within the block, the first call of ``net`` fills what is given; of a batch, its first clip is watched.

    ``seen.clip`` stays None where the network is not called.
    """
    seen = Seen()
    with ExitStack() as hooks:

        def began(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.clip, seen.padded = _kept(inputs[0][0]), (inputs[0].shape[-2], inputs[0].shape[-1])

        def ended(_: nn.Module, __: tuple[Tensor, ...], restored: Tensor) -> None:
            seen.restored = _kept(F.avg_pool2d(restored[0].float(), net.scale))
            _to_input_pixels(seen)
            hooks.close()

        hooks.callback(net.register_forward_pre_hook(began).remove)
        for module in net.modules():
            for kind, watch in _WATCHES.items():
                if isinstance(module, kind):
                    watch(module, seen, hooks)
        hooks.callback(net.register_forward_hook(ended).remove)
        yield seen


def _to_input_pixels(seen: Seen) -> None:
    """Bring maps and vectors of the network's grid, which may be coarser than the input, to that of the input."""
    assert seen.clip is not None
    height = seen.clip.shape[-2]

    def maps(x: Tensor) -> Tensor:
        factor = height // x.shape[-2]
        return x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)

    def vectors(x: Tensor) -> Tensor:
        return maps(x) * (height // x.shape[-2])

    if seen.fused:
        seen.padded = (seen.fused[0].frame.shape[-2], seen.fused[0].frame.shape[-1])
    seen.matched = None if seen.matched is None else vectors(seen.matched)
    seen.shifts = None if seen.shifts is None else vectors(seen.shifts)
    seen.confidence = None if seen.confidence is None else maps(seen.confidence)
    seen.aligned = {name: vectors(x) for name, x in seen.aligned.items()}
    seen.read = [vectors(x) for x in seen.read]
    seen.fused = [target._replace(frame=maps(target.frame)) for target in seen.fused]


def radial_energies(x: Float[Tensor, "*b h w"], bands: int = BANDS) -> Float[Tensor, "*b {bands}"]:
    """Mean energy in radial bands of pictures without their mean, under a Hann window: white noise of variance v has v.

    Without the window the jump from one edge of a picture to the other would drown its fine detail.
    """
    h, w = x.shape[-2:]
    taper = hann(h, w, x.device)
    x = x.float()
    spectrum = rfft2((x - x.mean((-2, -1), keepdim=True)) * taper / taper.square().mean().sqrt())
    return band_energies(spectrum, radial_bands(h, w, bands, x.device), w)


def mean_displacement(displacement: Float[Tensor, "b g k 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """Where deformable sampling reads, on average over groups and taps; a regular grid of taps counts as (0, 0)."""
    return displacement.float().mean((1, 2))


def _watch_matching(module: CorrelationMotion, seen: Seen, hooks: ExitStack) -> None:
    def look(_: nn.Module, __: tuple[Tensor, ...], motion: MiddleMotion) -> None:
        seen.matched = _kept((motion.to_later - motion.to_earlier)[0])

    hooks.callback(module.register_forward_hook(look).remove)


def _watch_guidance(module: SpectrumGuidance, seen: Seen, hooks: ExitStack) -> None:
    def look(_: nn.Module, pair: tuple, __: object) -> None:
        first, second = pair[:2]
        motion = module.pair_motion(first, second)  # once more: cheap, and as deterministic as the first time
        gaps = first.windows.shape[1]
        seen.shifts, seen.confidence = _kept(motion.vector[:gaps]), _kept(motion.confidence[:gaps])

    hooks.callback(module.register_forward_hook(look).remove)


def _watch_alignment(module: FeatureInterpolation, seen: Seen, hooks: ExitStack) -> None:
    def look(frame: str, _: nn.Module, __: tuple, offsets: tuple[Tensor, Tensor]) -> None:
        assert seen.clip is not None
        # forward in time comes first, of the batch's first clip: each gap's earlier frame is the first of its pair
        seen.aligned[frame] = _kept(mean_displacement(offsets[0][: len(seen.clip) - 1]))

    for frame, side in (("earlier", module.align.align_first), ("later", module.align.align_second)):
        finest = side.levels[0]
        assert isinstance(finest, AlignLevel)
        hooks.callback(finest.deform.offsets.register_forward_hook(partial(look, frame)).remove)


def _watch_attention(module: DeformableAttention, seen: Seen, hooks: ExitStack) -> None:
    fuse, fusion = module._fuse, module.fusion

    def look_at_offsets(_: nn.Module, __: tuple, offsets: tuple[Tensor, Tensor]) -> None:
        seen.read.append(mean_displacement(offsets[0]))  # of all clips of the batch: cut where it is known how many

    def look_at_weights(target: FusedTarget) -> None:
        weight, band, channel = (None if x is None else _kept(x[:1]) for x in target[2:])
        assert weight is not None
        seen.fused.append(FusedTarget(target.target, target.sources, weight, band, channel))
        seen.read[-1] = _kept(seen.read[-1][: len(target.sources)])

    def look_at_fusion(
        fetched: Tensor, relevance: Tensor, detail: Tensor | None, *, own: Tensor, target: int, sources: list[int]
    ) -> Tensor:
        look_at_weights(FusedTarget(target, tuple(sources), relevance.softmax(1), None, None))
        return fuse(fetched, relevance, detail, own=own, target=target, sources=sources)

    def look_at_features(_: nn.Module, inputs: tuple, __: Tensor) -> None:
        seen.feature_energies = _kept(radial_energies(inputs[0][0]).mean(1))

    hooks.callback(module.offsets.register_forward_hook(look_at_offsets).remove)
    hooks.callback(module.register_forward_hook(look_at_features).remove)
    if fusion is None:  # the plain softmax has no observer: its inputs are seen on their way
        module._fuse = look_at_fusion  # type: ignore[method-assign]
        hooks.callback(delattr, module, "_fuse")
        return
    before = fusion.observe

    def look_after(target: FusedTarget) -> None:
        look_at_weights(target)
        if before is not None:
            before(target)

    fusion.observe = look_after
    hooks.callback(setattr, fusion, "observe", before)


_WATCHES: dict[type[nn.Module], Callable[[Any, Seen, ExitStack], None]] = {
    CorrelationMotion: _watch_matching,
    SpectrumGuidance: _watch_guidance,
    FeatureInterpolation: _watch_alignment,
    DeformableAttention: _watch_attention,
}


def _kept(x: Tensor) -> Tensor:
    """A copy that outlives the call: float32, on the CPU; the network may write over its own tensors."""
    with torch.no_grad():
        return x.detach().to("cpu", torch.float32, copy=True)
