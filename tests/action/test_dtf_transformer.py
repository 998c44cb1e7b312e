"""DTF-Transformer: the published numbers, sizes and keys, and where frames meet."""

import pytest
import torch
from safetensors.torch import load_file
from seeded import SHARED
from tiny import awaken, relative_error, seeded_clip, unchecked
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from archs.action.dtf_net import MEAN, STD
from archs.action.dtf_transformer import DTFSwinBlock, DTFTransformer, published_key
from archs.layers import window_attention
from archs.layers.dtf import DTFBlock
from restore.cost import counting


def small(*, seed: int = 0, **arguments: object) -> DTFTransformer:
    """Narrow and shallow, with nothing left at zero; maps of 8x8 and 4x4 tokens, the second of one window."""
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "embed_dim": 16, "depths": (2, 2), "heads": (1, 2), "window": 4, "classes": 5}
    network = awaken(DTFTransformer(**{**sizes, "norm": "gn", **arguments}), 0.5).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    network(seeded_clip(2, 16, 3, 32, 32, seed=1))  # statistics, without which the filters explode
    return network.eval()


def filters(network: DTFTransformer) -> list[DTFBlock]:
    return [module for module in network.modules() if isinstance(module, DTFBlock)]


# ---- the published numbers


@pytest.fixture
def without_values(monkeypatch):
    """Networks of full size in no time and memory; this one way to draw weights looks at what it has drawn."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(window_attention, "cached_shift_mask", window_attention.shift_mask)  # keep no fake ones
    with FakeTensorMode():
        yield


@pytest.fixture(scope="module")
def published() -> tuple[DTFTransformer, dict[str, Tensor]]:
    """The tiny network with the weights of the golden file, and the file."""
    path = SHARED / "golden/dtf_swin_tiny.safetensors"
    if not path.is_file():
        pytest.skip("the complete golden files are not in ../shared")
    file = load_file(path)
    network = DTFTransformer(classes=10, image_size=112, embed_dim=32, depths=(2, 2, 2), heads=(1, 2, 4))
    network.load_published({key[6:]: tensor for key, tensor in file.items() if key.startswith("state.")})
    return network.eval().requires_grad_(False), file


def test_stages_and_logits(published):
    network, file = published
    stages = network.stages(file["x"].float())
    for i, stage in enumerate(stages):
        tokens = network.layers[i].merge(stage.movedim(2, -1)).flatten(0, 1).flatten(1, 2)
        assert_close(tokens, file[f"layer{i}"], atol=1e-4, rtol=0)
    clip = file["x"].float().transpose(1, 2) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert_close(network(clip), file["y"], atol=1e-4, rtol=0)


def test_published_entries(published):
    """What is left out on load is back on export: keys, shapes, and the values of all that is a constant."""
    network, file = published
    exported = network.export_published()
    expected = {key[6:]: tensor for key, tensor in file.items() if key.startswith("state.")}
    assert {key: tensor.shape for key, tensor in exported.items()} == {key: t.shape for key, t in expected.items()}
    constant = ("relative_position_index", "attn_mask", "weights_cor")
    for key in (key for key in expected if key.endswith(constant)):
        assert_close(exported[key], expected[key])


@pytest.mark.parametrize(
    ("frames", "parameters", "gmac"), [(16, 133.16, 64.98), (64, 251.41, 266.10)], ids=["16", "64"]
)
def test_parameters_and_cost(without_values, frames, parameters, gmac):
    """The table measured for the published base size at 224 px, in millions and 10^9; it counts what is never used."""
    with unchecked(), counting() as counter:
        network = DTFTransformer(clip_length=frames).eval()
        network(torch.zeros(1, frames, 3, 224, 224))
        state = network.export_published()
    buffers = ("relative_position_index", "attn_mask", "running_mean", "running_var", "num_batches_tracked")
    count = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(buffers))
    assert count / 1e6 == pytest.approx(parameters, abs=0.006)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.002)
    assert len(filters(network)) == 13
    path = SHARED / "specs/dtf_swin_state_dict.tsv"
    if frames == 64 and path.is_file():
        rows = (line.split("\t") for line in path.read_text().splitlines()[1:])
        assert {key: str(tuple(tensor.shape)) for key, tensor in state.items()} == {row[1]: row[2] for row in rows}


@pytest.mark.parametrize(("size", "width", "heads"), [("small", 96, 3), ("base", 128, 4), ("large", 192, 6)])
def test_sizes(without_values, size, width, heads):
    network = DTFTransformer(size=size, clip_length=4)
    blocks = [module for module in network.modules() if isinstance(module, DTFSwinBlock)]
    assert [len(layer.blocks) for layer in network.layers] == [2, 2, 18, 2]
    assert (blocks[0].widen.in_features, blocks[0].attention.heads) == (width, heads)
    assert (blocks[-1].widen.in_features, blocks[-1].attention.heads) == (8 * width, 8 * heads)
    assert [block.shift for block in blocks] == [0, 3] * 11 + [0, 0]
    assert blocks[-1].drop_rate == (0.3 if size == "small" else 0.5) and blocks[0].drop_rate == 0


# ---- published state_dicts


def test_keys():
    expected = {
        "embed.bias": "patch_embed.proj.bias",
        "layers.2.blocks.17.attention.position_bias": "layers.2.blocks.17.attn.relative_position_bias_table",
        "layers.0.blocks.0.dtf.scale": "layers.0.blocks.0.dtf_block.alpha1",
        "layers.0.blocks.1.narrow.bias": "layers.0.blocks.1.mlp.fc2.bias",
        "layers.0.merge.reduce.weight": "layers.0.downsample.reduction.weight",
        "layers.0.blocks.0.norm1.weight": "layers.0.blocks.0.norm1.weight",
    }
    assert {key: published_key(key) for key in expected} == expected
    network = small(norm="bn")
    assert len({published_key(key) for key in network.state_dict()}) == len(network.state_dict())


@pytest.mark.parametrize("complete", [False, True])
def test_published_weights_there_and_back(complete):
    source, target, clip = small(norm="bn"), small(norm="bn", seed=1), seeded_clip(1, 16, 3, 32, 32)
    state, before = source.export_published(), target(clip)
    assert before.isfinite().all()
    if not complete:
        ours = {published_key(key) for key in source.state_dict()}
        state = {key: tensor for key, tensor in state.items() if key in ours}
    target.load_published({"model": {f"module.{key}": tensor for key, tensor in state.items()}})
    assert torch.equal(target(clip), source(clip))
    assert (target(clip) - before).abs().max() > 1e-3


def test_weights_that_do_not_fit():
    state = small(norm="bn").export_published()
    with pytest.raises(ValueError, match=r"of another shape \(filters are tied to clip_length\): .*filter_g.weight"):
        small(norm="bn", clip_length=8).load_published(state)
    state["patch_embed.norm.weight"] = torch.ones(16)  # of the published Swin, which has a norm there
    with pytest.raises(ValueError, match=r"1 unexpected: patch_embed\.norm\.weight"):
        small(norm="bn").load_published(state)


# ---- laws


@pytest.mark.parametrize("predictor", ["native", "resample"])
@pytest.mark.parametrize(("frames", "h", "w"), [(16, 32, 32), (4, 32, 64), (24, 20, 36)])
def test_pyramid_of_any_length_and_size(predictor, frames, h, w):
    network, clip = small(predictor=predictor), seeded_clip(2, frames, 3, h, w)
    pyramid = network.features(clip)
    for i, level in enumerate(pyramid):
        stride = 4 * 2**i
        assert level.shape == (2, frames // 4, 16 * 2**i, -(-h // stride), -(-w // stride))
        assert level.isfinite().all()
    assert_close(network(clip), network.classify(pyramid[-1]))
    assert_close(network(clip[1:]), network(clip)[1:], atol=1e-4, rtol=1e-4)  # clips of a batch do not meet


def test_frames_meet_in_the_filters_alone():
    """At the start of training groups of four frames are apart; once the filters are awake all see all."""
    network, clip = small(), seeded_clip(1, 16, 3, 32, 32)
    changed = clip.clone()
    changed[:, 5] = 1 - changed[:, 5]
    awake = (network.features(changed)[0] - network.features(clip)[0]).abs().amax((0, 2, 3, 4))
    assert (awake > 1e-4).all()
    assert len(filters(network)) == 3
    for block in filters(network):
        block.scale.zero_()
    apart = (network.features(changed)[-1] - network.features(clip)[-1]).abs().amax((0, 2, 3, 4))
    assert (apart > 0).tolist() == [False, True, False, False]


def test_patches_merge_by_columns():
    network, x = small(), torch.arange(6.0).view(1, 1, 2, 3, 1).expand(1, 1, 2, 3, 16)
    seen = []
    merge = network.layers[0].merge
    merge.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert merge(x).shape == (1, 1, 1, 2, 32)
    assert seen[0][0, 0, 0, :, ::16].tolist() == [[0, 3, 1, 4], [2, 5, 0, 0]]  # odd sides are padded


def test_stochastic_depth_drops_groups_of_frames():
    block = DTFSwinBlock(16, 2, 4, 4, shift=2, drop_rate=0.5, dtf={}).requires_grad_(False)
    x = seeded_clip(16, 4, 4, 4, 16)
    torch.manual_seed(1)
    whole = (block(x) == x).flatten(2).all(2)  # both branches dropped: a quarter of the 64 groups
    assert 4 <= whole.sum() <= 32
    assert whole.any(1).sum() > whole.all(1).sum()


def test_every_parameter_has_a_gradient():
    network = small().requires_grad_(True)
    network(seeded_clip(2, 16, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_half_precision_is_close():
    network, clip = small(), seeded_clip(1, 16, 3, 32, 32)
    exact = network(clip)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(network(clip), exact) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size='huge' is none of small, base, large"),
        ({"heads": (1, 2, 4)}, r"heads=\(1, 2, 4\) and depths=\(2, 2\) are of different length"),
        ({"heads": (3, 2)}, "embed_dim=16 does not divide by heads=3"),
        ({"clip_length": 18}, "clip_length=18 does not divide by the 4 frames of the first layer"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 6, 3, 32, 32), "a clip of T=6 does not divide"), ((1, 16, 3, 32, 30), "divisible by 4, not 32x30")],
)
def test_clips_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))
