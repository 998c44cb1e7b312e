"""Image networks by their published names and in plain functions: narrow, shallow, with seeded weights."""

import torch
from seeded import value
from torch import Tensor
from torch.nn import functional as F

from archs.action.atm_clip import CLIP_MEAN, CLIP_STD
from archs.action.dtf_net import MEAN, STD

State = dict[str, Tensor]
BLOCKS, DEPTHS, HEADS, WINDOW = (1, 2, 1, 1), (2, 1, 1), (1, 2, 4), 4


# ---- files of the published forms, names and shapes written out


def resnet_file(width: int = 8, blocks: tuple[int, ...] = BLOCKS) -> State:
    """torchvision's names, which are timm's."""
    shapes = {"conv1.weight": (width, 3, 7, 7), **_batch_norm("bn1", width)}
    channels = width
    for i, count in enumerate(blocks):
        inner = width << i
        for j in range(count):
            block = f"layer{i + 1}.{j}"
            sizes = [(inner, channels, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            for k, shape in enumerate(sizes, 1):
                shapes |= {f"{block}.conv{k}.weight": shape, **_batch_norm(f"{block}.bn{k}", shape[0])}
            if not j:
                shapes[f"{block}.downsample.0.weight"] = (4 * inner, channels, 1, 1)
                shapes |= _batch_norm(f"{block}.downsample.1", 4 * inner)
            channels = 4 * inner
    shapes |= {"fc.weight": (10, channels), "fc.bias": (10,)}
    return {key: value(key, shape, gain=2.0) for key, shape in shapes.items()}


def _batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (channels,) for part in parts}, f"{name}.num_batches_tracked": ()}


def swin_file(width: int = 16, window: int = WINDOW, *, timm: bool = False) -> State:
    """Microsoft's names, or timm's, which keeps no buffers."""
    shapes = {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    shapes |= {**_pair("patch_embed.norm", width), **_pair("norm", width << 2), **_pair("head", 10, width << 2)}
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        c = width << i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shapes |= {**_pair(f"{block}.norm1", c), **_pair(f"{block}.norm2", c)}
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            for name, out, fan_in in [
                ("attn.qkv", 3 * c, c), ("attn.proj", c, c), ("mlp.fc1", 4 * c, c), ("mlp.fc2", c, 4 * c),
            ]:  # fmt: skip
                shapes |= _pair(f"{block}.{name}", out, fan_in)
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
        if i < 2:
            merge = f"layers.{i}.downsample"
            shapes |= {**_pair(f"{merge}.norm", 4 * c), f"{merge}.reduction.weight": (2 * c, 4 * c)}
    file = {key: value(key, shape) for key, shape in {**shapes, "layers.0.blocks.1.attn_mask": (16, 16, 16)}.items()}
    if not timm:
        return file
    names = {
        "layers.1.downsample": "layers.2.downsample",
        "layers.0.downsample": "layers.1.downsample",
        "head": "head.fc",
    }
    for microsoft, other in names.items():
        file = {key.replace(microsoft, other): tensor for key, tensor in file.items()}
    return {key: tensor for key, tensor in file.items() if not key.endswith(("position_index", "attn_mask"))}


def _pair(name: str, out: int, *fan_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *fan_in), f"{name}.bias": (out,)}


CLIP_BLOCK = [  # OpenAI's names, timm's, shapes in widths
    ("ln_1.weight", "norm1.weight", (1,)), ("ln_1.bias", "norm1.bias", (1,)),
    ("attn.in_proj_weight", "attn.qkv.weight", (3, 1)), ("attn.in_proj_bias", "attn.qkv.bias", (3,)),
    ("attn.out_proj.weight", "attn.proj.weight", (1, 1)), ("attn.out_proj.bias", "attn.proj.bias", (1,)),
    ("ln_2.weight", "norm2.weight", (1,)), ("ln_2.bias", "norm2.bias", (1,)),
    ("mlp.c_fc.weight", "mlp.fc1.weight", (4, 1)), ("mlp.c_fc.bias", "mlp.fc1.bias", (4,)),
    ("mlp.c_proj.weight", "mlp.fc2.weight", (1, 4)), ("mlp.c_proj.bias", "mlp.fc2.bias", (1,)),
]  # fmt: skip


def clip_file(width: int = 16, *, side: int = 4, patch: int = 4, timm: bool = False) -> State:
    """OpenAI's names with something of the text tower, or timm's image tower."""
    rows = [
        ("visual.class_embedding", "cls_token", (width,)),
        ("visual.positional_embedding", "pos_embed", (1 + side**2, width)), ("visual.proj", "head.weight", (width, 8)),
        ("visual.conv1.weight", "patch_embed.proj.weight", (width, 3, patch, patch)),
    ]  # fmt: skip
    for ours, theirs in [("ln_pre", "norm_pre"), ("ln_post", "norm")]:
        rows += [(f"visual.{ours}.{part}", f"{theirs}.{part}", (width,)) for part in ("weight", "bias")]
    for i in range(2):
        block = f"visual.transformer.resblocks.{i}"
        rows += [(f"{block}.{a}", f"blocks.{i}.{b}", tuple(n * width for n in s)) for a, b, s in CLIP_BLOCK]
    values = {name: value(name, shape) for name, _, shape in rows}
    if not timm:
        text = ["positional_embedding", "text_projection", "token_embedding.weight", "ln_final.bias", "vocab_size",
                "logit_scale", "transformer.resblocks.0.attn.in_proj_weight", "input_resolution"]  # fmt: skip
        return {**values, **{name: torch.ones(3, 3) for name in text}}
    file = {other: values[name] for name, other, _ in rows} | {"head.bias": torch.zeros(8)}
    return file | {
        "cls_token": file["cls_token"][None, None],
        "pos_embed": file["pos_embed"][None],
        "head.weight": file["head.weight"].T.contiguous(),
    }


# ---- the image networks in plain functions


def images(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (frames - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def resnet(state: State, frames: Tensor) -> list[Tensor]:
    """Maps after the stages."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.conv2d(images(frames, MEAN, STD), state["conv1.weight"], stride=2, padding=3)
    x, stages = F.max_pool2d(norm(x, "bn1").relu(), 3, 2, 1), []
    for i, count in enumerate(BLOCKS):
        for j in range(count):
            block, stride = f"layer{i + 1}.{j}.", 2 if i and not j else 1
            y = norm(F.conv2d(x, state[f"{block}conv1.weight"]), f"{block}bn1").relu()
            y = norm(F.conv2d(y, state[f"{block}conv2.weight"], stride=stride, padding=1), f"{block}bn2").relu()
            y = norm(F.conv2d(y, state[f"{block}conv3.weight"]), f"{block}bn3")
            if not j:
                x = norm(F.conv2d(x, state[f"{block}downsample.0.weight"], stride=stride), f"{block}downsample.1")
            x = (x + y).relu()
        stages.append(x)
    return stages


def swin(state: State, frames: Tensor) -> list[Tensor]:
    """Maps after the stages, and the normalised last; Microsoft's names; no norm after the patch embedding."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    patches = (state[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x, stages = F.conv2d(images(frames, MEAN, STD), *patches, stride=4).movedim(1, -1), []
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        if i:
            merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = linear(norm(merged, f"layers.{i - 1}.downsample.norm"), f"layers.{i - 1}.downsample.reduction")
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            bias = _window_bias(x.shape[1], WINDOW // 2 * (j % 2), state[f"{block}attn.relative_position_bias_table"])
            parts = linear(norm(x, f"{block}norm1").flatten(1, 2), f"{block}attn.qkv").unflatten(2, (3, heads, -1))
            y = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), attn_mask=bias).transpose(1, 2)
            x = x + linear(y.flatten(2), f"{block}attn.proj").view_as(x)
            x = x + linear(F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")), f"{block}mlp.fc2")
        stages.append(x.movedim(-1, 1))
    return [*stages, norm(x, "norm")]


def _window_bias(side: int, shift: int, table: Tensor) -> Tensor:
    """(heads, tokens, tokens): the table's bias within a window of the shifted tiling of the plane, -inf across."""
    rows, columns = torch.cartesian_prod(torch.arange(side), torch.arange(side)).T
    windows = 100 * ((rows - shift) // WINDOW) + (columns - shift) // WINDOW
    together = windows[:, None] == windows
    index = (rows[:, None] - rows + WINDOW - 1) * (2 * WINDOW - 1) + columns[:, None] - columns + WINDOW - 1
    return table[index.where(together, 0)].permute(2, 0, 1).masked_fill(~together, float("-inf"))


def clip_embedding(state: State, frames: Tensor, rectified: int | None) -> Tensor:
    """CLIP's embedding; patch tokens go through a ReLU before block ``rectified``. OpenAI's names."""
    visual = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (16,), visual[f"{name}.weight"], visual[f"{name}.bias"])

    patches = F.conv2d(images(frames, CLIP_MEAN, CLIP_STD), visual["conv1.weight"], stride=4).flatten(2)
    x = torch.cat([visual["class_embedding"].expand(1, len(frames), 16), patches.permute(2, 0, 1)])
    x = norm(x + visual["positional_embedding"][:, None], "ln_pre")
    for i in range(2):
        x = torch.cat([x[:1], x[1:].relu()]) if i == rectified else x
        block = f"transformer.resblocks.{i}"
        y, parts = norm(x, f"{block}.ln_1"), ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        inner, inner_bias, outer, outer_bias = (visual[f"{block}.attn.{part}"] for part in parts)
        x = x + F.multi_head_attention_forward(
            y, y, y, 16, 2, inner, inner_bias, None, None, False, 0.0, outer, outer_bias, training=False,
        )[0]  # fmt: skip
        wide = F.linear(norm(x, f"{block}.ln_2"), visual[f"{block}.mlp.c_fc.weight"], visual[f"{block}.mlp.c_fc.bias"])
        gelu = wide * (1.702 * wide).sigmoid()
        x = x + F.linear(gelu, visual[f"{block}.mlp.c_proj.weight"], visual[f"{block}.mlp.c_proj.bias"])
    return norm(x[0], "ln_post") @ visual["proj"]
