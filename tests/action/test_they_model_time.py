"""Action backbones tell how textures move, their blocks over time do it, and time run backwards flips the answer.

Four classes: left or right, 2 or 4 pixels a frame, of textures from which a single frame tells nothing
(`restore.moving_textures`). Tiny networks learn them from photographs that are not among those they are scored on.
DTF's first layer takes four frames for one: it is shown every frame four times, so that only the filters see motion.
Without the blocks over time the same networks, trained in the same way, see a set of frames and stay at chance.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archs.action import CLASSIFIERS
from archs.contract import ClipClassifier
from archs.layers.dtf import DTFBlock
from restore.moving_textures import moving_textures

FRAMES, SIDE, BATCH = 4, 16, 32
SEEN, HELD_OUT = ("gravel", "brick", "astronaut", "chelsea"), ("grass", "coffee")
MIRRORED = torch.tensor([2, 3, 0, 1])  # left 2, left 4, right 2, right 4 -> the same speed in the other direction
NETWORKS: dict[str, tuple[dict[str, Any], float, int]] = {  # arguments, learning rate, iterations
    "dtf_net": ({"width": 8, "blocks": (1, 1, 1, 1), "clip_length": 4 * FRAMES, "norm": "gn"}, 1e-2, 500),
    "dtf_transformer": (
        {"embed_dim": 16, "depths": (2, 2), "heads": (1, 2), "window": 4, "image_size": SIDE, "drop_path": 0.0,
         "clip_length": 4 * FRAMES}, 1e-2, 350,
    ),
    "atm_resnet": (
        {"depth": (1, 1, 1, 1), "width": 8, "after": (1,), "operations": ("sub",), "hidden": 16, "stride": 1,
         "context": 3, "ends": "replicate"}, 1e-2, 400,
    ),
}  # fmt: skip
SLOW = ("dtf_net", "dtf_transformer")  # about 35 and 25 seconds of a core, and half of it without their blocks
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS]
)


def rendered(photos: tuple[str, ...], number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips (number, FRAMES, 3, SIDE, SIDE), 8 bit, and their classes."""
    found = moving_textures(
        ["left", "right"], [2, 4], hold=1, photos=photos, number=number, length=FRAMES, side=SIDE, seed=seed
    )
    clips = torch.stack([torch.stack(list(clip.open().truth(range(FRAMES)))) for clip in found.clips])
    return clips, torch.tensor([clip.label for clip in found.clips])


@pytest.fixture(scope="module")
def clips() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return rendered(SEEN, 4096, 1), rendered(HELD_OUT, 256, 2)


def tiny(name: str, *, blind: bool) -> ClipClassifier:
    """The network; ``blind``: what lets frames meet is the identity."""
    torch.manual_seed(0)
    network = CLASSIFIERS[name](classes=4, dropout=0.0, **NETWORKS[name][0])
    for place, module in list(network.named_modules()) if blind else ():
        if isinstance(module, DTFBlock):
            network.set_submodule(place, nn.Identity())
    if blind and name == "atm_resnet":
        network.set_submodule("atm", nn.ModuleDict())
    return network


def shown(network: ClipClassifier, clips: Tensor) -> Tensor:
    """As floats, every frame as often as the network takes frames for one."""
    return (clips.float() / 255).repeat_interleave(network.frames_multiple_of, 1)


def trained(name: str, clips: Tensor, labels: Tensor, *, blind: bool) -> ClipClassifier:
    _, rate, iterations = NETWORKS[name]
    network = tiny(name, blind=blind).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=iterations, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(iterations):
        chosen = torch.randint(len(clips), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(shown(network, clips[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def answers(network: ClipClassifier, clips: Tensor) -> Tensor:
    return torch.cat([network(shown(network, part)).argmax(1) for part in clips.split(64)])


def share(right: Tensor) -> float:
    return right.float().mean().item()


@every_network
def test_direction_and_speed(name, clips, record_property):
    (seen, labels), (held_out, expected) = clips
    network = trained(name, seen, labels, blind=False)
    forwards, backwards = answers(network, held_out), answers(network, held_out.flip(1))
    figures = {
        "forwards": share(forwards == expected),
        "backwards, mirrored": share(backwards == MIRRORED[expected]),
        "direction flips": share(backwards // 2 != forwards // 2),
    }
    print(name, figures)
    record_property("figures", figures)
    assert figures["forwards"] >= 0.95
    assert figures["backwards, mirrored"] >= 0.9 and figures["direction flips"] >= 0.9


@every_network
def test_without_its_block_over_time_it_stays_at_chance(name, clips):
    (seen, labels), (held_out, expected) = clips
    network = trained(name, seen, labels, blind=True)
    figure = share(answers(network, held_out) == expected)
    print(name, figure)
    assert figure < 0.35
    backwards = answers(network, held_out.flip(1))
    assert share(answers(network, held_out) == backwards) > 0.95, "a set of frames has no direction"
