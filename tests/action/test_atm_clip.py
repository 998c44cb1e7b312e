"""ATM-CLIP: the released program's names, shapes and order of work, and the laws that hold for any weights."""

from typing import Any

import pytest
import torch
from seeded import SHARED
from tiny import seeded_clip
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from archs.action.atm_clip import (
    ATM_CLIPS,
    ATMCLIP,
    CLIP_MEAN,
    CLIP_STD,
    ClassTokenShift,
    from_published,
    published_key,
    resized_positions,
    to_published,
)

TINY: dict[str, Any] = {
    "classes": 5, "patch": 4, "width": 16, "depth": 4, "heads": 2, "projected": 8, "atm_at": 2, "size": 16, "hidden": 4,
}  # fmt: skip


def tiny(**arguments: object) -> ATMCLIP:
    """A small network whose ATM takes part."""
    torch.manual_seed(0)
    network = ATMCLIP(**{**TINY, **arguments}).eval().requires_grad_(False)
    for key, parameter in network.named_parameters():
        if "transfer.expand" in key:
            parameter.normal_()
    return network


def released_file() -> dict[str, Tensor]:
    """A file as the released program writes it, names and shapes as in the list of them, at the size of `TINY`."""
    width = 16
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,), "visual.positional_embedding": (17, width), "visual.proj": (width, 8),
        "visual.conv1.weight": (width, 3, 4, 4), "fc.weight": (5, 8), "fc.bias": (5,),
    }  # fmt: skip
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.{part}": (width,) for part in ("weight", "bias")}
    for i in range(4):
        block = f"visual.transformer.resblocks.{i}."
        for name, out, fan_in in [
            ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width), ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ]:  # fmt: skip
            shapes |= {f"{block}{name}weight": (out, fan_in), f"{block}{name}bias": (out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{block}control_point{j}.conv.weight": (width, 1, 3) for j in (1, 2)}
    atm = "visual.transformer.resblocks.2.control_point_c."
    shapes |= {f"{atm}{name}": shape for name, shape in _atm(width, 4).items()}
    generator = torch.Generator().manual_seed(0)
    return {name: _made_up(name, shape, generator) for name, shape in shapes.items()}


def _atm(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    convolutions: list[tuple[str, int, tuple[int, ...]]] = [
        ("corrlayer.sim.downsample.", 0, (hidden, width, 3, 3)), ("difflayer.downsample.", 0, (hidden, width, 3, 3)),
    ]  # fmt: skip
    for i, (out, fan_in) in enumerate([(4, 1), (16, 4), (hidden, 16), (hidden, hidden)]):
        convolutions.append((f"corrlayer.uv2c.conv{i}.", 0, (out, fan_in, 1, 3, 3)))
    shapes: dict[str, tuple[int, ...]] = {}
    for stem in ("corrlayer.sim2vis.", "difflayer.diff2vis."):
        convolutions += [(f"{stem}conv{i}.", 0, (hidden, hidden, 1, 3, 3)) for i in (1, 2)]
        convolutions.append((f"{stem}conv3_fuse.", 1, (hidden, 5 * hidden, 1, 3, 3)))
        shapes[f"{stem}upsample.0.weight"] = (width, hidden, 1, 1, 1)
    for name, first, shape in convolutions:
        shapes[f"{name}{first}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}{first + 1}.{part}"] = shape[:1]
        shapes[f"{name}{first + 1}.num_batches_tracked"] = ()
    return shapes


def _made_up(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(3)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    scale = shape[0] if len(shape) == 1 else shape[1] if "embedding" in name else noise[0].numel()
    return noise / scale**0.5


# ---- the released program


def test_released_files_and_back():
    """Every weight arrives, at every place another one, and comes back as it was."""
    released = released_file()
    network = tiny()
    network.load_published({"module": released})
    again = network.export_published()
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())
    prefixed = from_published({f"module.{name}": tensor for name, tensor in released.items()})
    assert all(torch.equal(prefixed[key], tensor) for key, tensor in network.state_dict().items())
    assert all(published_key(published_key(key), back=True) == key for key in network.state_dict())


@pytest.mark.skipif(not (SHARED / "specs").is_dir(), reason="the list of released names is not in ../shared")
def test_names_and_shapes_of_the_released_size():
    rows = [line.split("\t") for line in (SHARED / "specs/atm_state_dict.tsv").read_text().splitlines()[1:]]
    with torch.device("meta"):
        released = to_published(ATMCLIP(classes=400, **ATM_CLIPS["b16"]).state_dict())
    assert {name: str(tuple(tensor.shape)) for name, tensor in released.items()} == {
        name: shape.replace("num_classes", "400") for _, name, shape, _ in rows
    }


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("b16", 88_000_284, 252), ("l14", 306_296_092, 420)])
def test_size_and_cost(name, parameters, tensors):
    """8 frames of 224x224: CLIP's encoder eight times and ATM once."""
    with torch.device("meta"):
        network = ATMCLIP(classes=400, **ATM_CLIPS[name]).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert network(torch.zeros(1, 8, 3, 224, 224)).shape == (1, 400)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert [i for i, block in enumerate(network.blocks) if block.atm is not None] == [{"b16": 7, "l14": 14}[name]]
    width, depth, patch = (ATM_CLIPS[name][key] for key in ("width", "depth", "patch"))
    patches = (224 // patch) ** 2
    block = 12 * width**2 * (patches + 1) + 2 * width * (patches + 1) ** 2
    clip_gmac = 8 * (depth * block + patches * 3 * patch**2 * width) / 1e9
    transfer = 2 * 9 * 64 * 64 * 5 + 9 * 320 * 64 + 64 * width  # multiply-adds a patch of either branch
    displacements = 5 * (81 * 9 * 4 + 25 * 9 * 4 * 16 + 9 * 9 * 16 * 64 + 9 * 64 * 64)
    atm_gmac = 8 * patches * (2 * (9 * width * 64 + transfer) + displacements) / 1e9
    assert counter.get_total_flops() / 2e9 == pytest.approx(clip_gmac + atm_gmac, rel=1e-3)


def test_host_as_released():
    """The same weights by PyTorch's own attention, sequence first, in the order of the released program."""
    network, clip = tiny(), seeded_clip(2, 3, 3, 16, 16)
    released = released_file()
    network.load_published(released)
    visual = {name.removeprefix("visual."): tensor for name, tensor in released.items()}
    images = (clip.flatten(0, 1) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    patches = F.conv2d(images, visual["conv1.weight"], stride=4).flatten(2).permute(2, 0, 1)  # (16, 6, 16)
    x = torch.cat([visual["class_embedding"].expand(1, 6, 16), patches]) + visual["positional_embedding"][:, None]
    x = _norm(x, visual, "ln_pre")
    for i in range(4):
        weights = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in visual.items()}
        if i == 2:
            x = network.blocks[2].atm(x.transpose(0, 1).unflatten(0, (2, 3)), (4, 4)).flatten(0, 1).transpose(0, 1)
        x = _shift(x, weights["control_point1.conv.weight"])
        x = x + _attention(_norm(x, weights, "ln_1"), weights)
        x = _shift(x, weights["control_point2.conv.weight"])
        wide = F.linear(_norm(x, weights, "ln_2"), weights["mlp.c_fc.weight"], weights["mlp.c_fc.bias"])
        x = x + F.linear(wide * (1.702 * wide).sigmoid(), weights["mlp.c_proj.weight"], weights["mlp.c_proj.bias"])
    frames = (_norm(x, visual, "ln_post")[0] @ visual["proj"]).unflatten(0, (2, 3))
    assert_close(network.embed(clip), frames, atol=1e-5, rtol=1e-5)
    expected = F.linear(frames.mean(1), released["fc.weight"], released["fc.bias"])
    assert_close(network(clip), expected, atol=1e-5, rtol=1e-5)
    assert_close(network.features(clip)[-1][1, 2], x[1:, 5].T.unflatten(1, (4, 4)), atol=1e-5, rtol=1e-5)


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"])


def _shift(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, 2 * 3, c), sequence first: clips of 3 frames."""
    first = x[0].unflatten(0, (2, 3)).transpose(1, 2)
    shifted = F.conv1d(first, weight, padding=1, groups=16).transpose(1, 2).flatten(0, 1)
    return torch.cat([shifted[None], x[1:]])


def _attention(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return F.multi_head_attention_forward(
        x, x, x, 16, 2, weights["attn.in_proj_weight"], weights["attn.in_proj_bias"], None, None, False, 0.0,
        weights["attn.out_proj.weight"], weights["attn.out_proj.bias"], training=False, need_weights=False,
    )[0]  # fmt: skip


# ---- laws


def test_a_fresh_shift():
    tokens = seeded_clip(1, 4, 3, 8)
    shifted = ClassTokenShift(8)(tokens)
    assert torch.equal(shifted[:, :, 1:], tokens[:, :, 1:])
    assert torch.equal(shifted[:, :-1, 0, :2], tokens[:, 1:, 0, :2])  # from the next frame
    assert torch.equal(shifted[:, 1:, 0, 2:4], tokens[:, :-1, 0, 2:4])  # from the previous one
    assert torch.equal(shifted[:, :, 0, 4:], tokens[:, :, 0, 4:])
    assert not shifted[:, -1, 0, :2].any() and not shifted[:, 0, 0, 2:4].any()


@pytest.mark.parametrize(("frames", "size"), [(1, (16, 16)), (3, (4, 12)), (5, (20, 8))])
def test_any_length_and_size(frames, size):
    network, clip = tiny(), seeded_clip(2, frames, 3, *size)
    assert network(clip).shape == (2, 5)
    maps = network.features(clip)
    assert len(maps) == len(network.feature_channels) == len(network.feature_strides) == 4
    for features, channels, stride in zip(maps, network.feature_channels, network.feature_strides, strict=True):
        assert features.shape == (2, frames, channels, size[0] // stride, size[1] // stride)
        assert features.isfinite().all()


def test_clips_of_a_batch_do_not_meet_and_frames_do():
    network, clips = tiny(), seeded_clip(3, 4, 3, 16, 16)
    together = network(clips)
    assert_close(together[1:2], network(clips[1:2]), atol=1e-5, rtol=1e-5)
    changed = clips.clone()
    changed[0, 3] = 1 - changed[0, 3]
    before, after = network.features(clips)[-1], network.features(changed)[-1]
    assert ((after - before)[0].abs().amax((1, 2, 3)) > 1e-4).all()
    assert_close(after[1:], before[1:], atol=1e-5, rtol=1e-5)


def test_without_shifts_and_atm_every_frame_is_for_itself():
    network, clip = tiny(atm_at=None), seeded_clip(1, 3, 3, 16, 16)
    for block in network.blocks:
        for shift in (block.shift1, block.shift2):
            shift.conv.weight.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert_close(network.embed(clip)[:, 1:2], network.embed(clip[:, 1:2]), atol=1e-5, rtol=1e-5)
    assert_close(network(clip), network(clip.flip(1)), atol=1e-5, rtol=1e-5)
    assert (tiny()(clip) - tiny()(clip.flip(1))).abs().max() > 1e-3  # the order of frames matters to ATM


def test_gradients_reach_every_weight():
    network, clip = tiny().requires_grad_(), seeded_clip(1, 3, 3, 16, 16).requires_grad_()
    network(clip).square().sum().backward()
    for key, parameter in [("clip", clip), *network.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_positions():
    """The same at their own size; at another planes stay planes, and the class token's is as it was."""
    position = torch.cat([torch.full((1, 2), 9.0), torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))])
    assert resized_positions(position, (6, 6)) is position
    resized = resized_positions(position, (12, 6))
    assert resized.shape == (1 + 72, 2) and torch.equal(resized[0], position[0])
    rows, columns = resized[1:].T.unflatten(1, (12, 6))
    assert_close(columns, torch.arange(6.0).expand(12, 6))
    inner = ((torch.arange(12.0) + 0.5) / 2 - 0.5)[4:-4, None].expand(4, 6)  # away from the border
    assert_close(rows[4:-4], inner, atol=0.05, rtol=0)  # PyTorch's cubic (a = -0.75) is not exact on planes


def test_taps():
    clip = seeded_clip(1, 2, 3, 16, 16)
    every, two = tiny(taps=(0, 1, 2, 3)).features(clip), tiny(taps=(3, 1)).features(clip)
    assert len(two) == 2 and torch.equal(two[0], every[1]) and torch.equal(two[1], every[3])
    assert ATMCLIP(**{**TINY, "depth": 2, "atm_at": None}).taps == (0, 1)


# ---- refusals


def test_sizes_and_files_that_do_not_fit():
    with pytest.raises(ValueError, match="ATM-CLIP needs height and width divisible by 4, not 16x18"):
        tiny()(torch.zeros(1, 2, 3, 16, 18))
    with pytest.raises(ValueError, match=r"visual\.layer1\.weight: no weight of this ATM is called so"):
        from_published({"visual.layer1.weight": torch.zeros(1)})
    lacking = {name: tensor for name, tensor in released_file().items() if name != "visual.proj"}
    with pytest.raises(ValueError, match=r"other classes, size, depth or atm_at\?\): missing visual\.proj$"):
        tiny().load_published(lacking)
    with pytest.raises(ValueError, match=r"fc\.bias is \(5,\), not \(7,\); fc\.weight is \(5, 8\), not \(7, 8\)$"):
        tiny(classes=7).load_published(released_file())
    with pytest.raises(ValueError, match=r"unexpected visual\.transformer\.resblocks\.3\.attn\.in_proj_bias;"):
        tiny(depth=3).load_published(released_file())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "width=16 does not divide by heads=3"),
        ({"size": 18}, "size=18 is not a multiple of patch=4"),
        ({"atm_at": 4}, r"atm_at=4 is not within 0\.\.3"),
        ({"taps": (4,)}, r"taps=\(4,\) are not blocks 0\.\.3"),
        ({"taps": ()}, r"taps=\(\) are not blocks"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ATMCLIP(**{**TINY, **arguments})
