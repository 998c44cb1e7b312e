"""STDAN-freq: STDAN with frequency-domain alignment and energy-weighted softmax fusion.

    clip -> encoder -> (P1) enhancement -> LSTFI <- (P2) spectrum guidance -> STDFA <- (P3) energy fusion
         -> temporal block -> (P4) enhancement -> decoder -> upsampler

Without interpolation (``time_scale=1``, deblurring) there is no LSTFI, and the spectra guide the offsets of STDFA.

The network and its places P1 to P4 are this project's own, inspired by the spectrum prior and the energy prior of Zhu
et al. (ICCV 2023) and the multi-frequency enhancement of MFPI (Li et al., ICCV 2023), of which no code is public:
nothing here reproduces them. Every component is a keyword. With all of them off this is `STDAN`, key for key and bit
for bit; fresh components change nothing, so that weights of STDAN load and fine-tune.
"""

from typing import Any, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from archs.contract import and_keywords_of
from archs.layers.blocks import per_frame
from archs.layers.dct_gate import CompressionCondition
from archs.layers.deform_attention import DeformableAttention
from archs.layers.energy_attention import EnergyFusion
from archs.layers.feature_interpolation import FeatureInterpolation
from archs.layers.frequency_align import SpectrumGuidance
from archs.layers.motion_distillation import MotionDistillation, motion_losses
from archs.layers.motion_prior import MiddleMotion
from archs.layers.multi_frequency import FrequencyEnhancement, PlainEnhancement
from archs.layers.temporal import temporal_block
from archs.stdan import STDAN

Part = TypeVar("Part", bound=nn.Module)


class STDANFreq(STDAN):
    """`STDAN` with up to nine components, each a keyword; the other keywords are STDAN's.

    - ``enhance`` (P1, P4): enhancement in space and frequency after the encoder and after the aggregation, with
      "radial", "polar" or "global" filters; for comparison "global_bicubic", resized as GFNet does, and "plain", two
      convolutions of the same size instead; None: off.
    - ``guide`` (P2): what the spectra of a pair tell the offsets of its alignment; ``guidance`` chooses how,
      and phase correlation works on windows of ``guidance_window`` pixels of the features' grid.
    - ``prior`` (P2): phase correlation as the place where that alignment starts.
    - ``motion_branch`` (P2): frequency-temporal gradients added to the offset features: "explicit", "distilled" (shown
      in training, guessed by a student at inference; needs an `AuxiliaryLoss` named motion) or "student"; None: off.
    - ``location`` (P3): sources count more where what was read of them is sharp.
    - ``bands`` (P3): "polar", "radial" or "bin": the answers of the sources fused by energy and coherence; ``logit``,
      ``energy_power`` and ``coherence`` are where its weights start; None: off.
    - ``channel`` (P3): channels weighed by their spectra.
    - ``temporal``: a block of action networks over the sequence after the aggregation: "dtf", a filter over time
      predicted per location, or "atm", products and differences of neighbouring frames; None: off.
    - ``dct_condition``: features modulated by gated DCT coefficients of the input, for compressed footage.

    P3 is off by default: in the small trainings of `bench.ablation` it gained nothing, while P2 gained where input is
    sharp and P1 and P4 a little where it is blurred (docs/training_notes.md). The recipe options/stdan_freq.yml has
    the whole design. With STDAN's ``motion_prior="correlation"``, ``phase_start`` lets block matching start from phase
    correlation. ValueError for components that the chosen parts have no place for.
    """

    added = (
        *("enhance_encoded.", "enhance_gathered.", "condition.", "temporal.", "interpolate.guidance."),
        *("aggregate.guidance.", "aggregate.fusion."),
        *(f"interpolate.align.align_{side}.levels.{n}.motion." for side in ("first", "second") for n in range(9)),
    )

    @and_keywords_of(STDAN)
    def __init__(
        self,
        *,
        enhance: Literal["radial", "polar", "global", "global_bicubic", "plain"] | None = "radial",
        guide: bool = True,
        guidance: Literal["filter", "surface", "fcvsr"] = "filter",
        guidance_window: int = 32,
        prior: bool = True,
        motion_branch: Literal["explicit", "distilled", "student"] | None = None,
        location: bool = False,
        bands: Literal["polar", "radial", "bin"] | None = None,
        logit: Literal["log", "raw"] = "log",
        energy_power: float = 2.0,
        coherence: float = 1.0,
        channel: bool = False,
        temporal: Literal["dtf", "atm"] | None = None,
        dct_condition: bool = False,
        phase_start: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        channels = self.channels
        self.enhance_encoded = _enhancement(enhance, channels)
        self.enhance_gathered = _enhancement(enhance, channels)
        self.condition = CompressionCondition(channels) if dct_condition else None
        self.temporal = temporal_block(temporal, channels) if temporal else None
        if guide or prior:
            choices: dict[str, Any] = {"guide": guide, "prior": prior, "motion": guidance, "window": guidance_window}
            if self.interpolate is None:
                attention = _part(self.aggregate, DeformableAttention, "guide and prior", "exchange='attention'")
                width = attention.embed.out_channels
                attention.guidance = SpectrumGuidance(width, attention.groups, levels=1, **choices)
            else:
                alignment = _part(self.interpolate, FeatureInterpolation, "guide and prior", "between='lstfi'")
                alignment.guidance = SpectrumGuidance(channels, alignment.groups, alignment.levels, **choices)
        if motion_branch:
            needed = "between='lstfi' and time_scale=2"
            alignment = _part(self.interpolate, FeatureInterpolation, "motion_branch", needed)
            for side in (alignment.align.align_first, alignment.align.align_second):
                for level, part in enumerate(side.levels):
                    part.motion = MotionDistillation(channels, motion=motion_branch, window=max(32 >> level, 8))
        if location or bands or channel:
            what = "location, bands and channel"
            attention = _part(self.aggregate, DeformableAttention, what, "exchange='attention'")
            attention.fusion = EnergyFusion(
                attention.embed.out_channels, location=location, bands=bands, channel=channel, logit=logit,
                p=energy_power, kappa=coherence,
            )  # fmt: skip
        if phase_start:
            if self.motion is None:
                raise ValueError("phase_start is where motion_prior='correlation' starts: set that, too")
            self.motion.first = "phase"

    def encode(self, clip: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c hg wg"]:
        """Features of every input frame, enhanced (P1)."""
        features = super().encode(clip)
        if self.condition is not None:
            features = self.condition(features.flatten(0, 1), clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return features if self.enhance_encoded is None else per_frame(self.enhance_encoded, features)

    def gather(self, sequence: Float[Tensor, "b u c h w"], motion: MiddleMotion | None) -> Float[Tensor, "b u c h w"]:
        """Every frame with what it takes from the others, in the temporal block too, enhanced (P4)."""
        sequence = super().gather(sequence, motion)
        if self.temporal is not None:
            sequence = self.temporal(sequence)
        return sequence if self.enhance_gathered is None else per_frame(self.enhance_gathered, sequence)

    def heavy_modules(self) -> list[nn.Module]:
        """Those of STDAN, and the temporal block."""
        return [*super().heavy_modules(), *([] if self.temporal is None else [self.temporal])]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The gate's share of open channels, the distillation of motion: of what there is."""
        return {**motion_losses(self), **({} if self.condition is None else self.condition.auxiliary_losses())}


def _enhancement(name: str | None, channels: int) -> nn.Module | None:
    if name == "plain":
        return PlainEnhancement(channels)
    return FrequencyEnhancement(channels, filter=name) if name else None


def _part(part: nn.Module | None, kind: type[Part], components: str, keyword: str) -> Part:
    """The part that components need; ValueError where the network was built with another."""
    if not isinstance(part, kind):
        raise ValueError(f"{components} belong into {kind.__name__}: set {keyword}, or switch them off")
    return part
