"""Weights on disk: our safetensors files, published `.pth` files, and the key maps between them.

A file of ours carries its architecture and constructor arguments as metadata, so that restoring needs no options
file. Published checkpoints are read with `weights_only=True` and recognised by their keys. Whatever is missing or
unexpected is an error that lists it; every file is written beside its name and renamed when it is complete.
"""

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from archs import ARCHS, CLASSIFIERS, VideoNet
from archs.layers.window_attention import ResidualSwinGroup, SwinBlock, relative_positions, shift_mask
from restore import manifest

Network = TypeVar("Network", bound=nn.Module)

WEIGHTS = Path(__file__).with_name("weights")  # networks that ship with the package
DEFAULT_MODEL = "stdan_freq_s"


class CheckpointError(ValueError):
    """A file of weights that cannot be used; the message names the file, the reason and the way out."""


def shipped_models() -> list[str]:
    """Names that `load_network` knows without a path."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load_network(
    name_or_path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VideoNet:
    """A network in eval mode from a shipped model's name, a safetensors file of ours or a published `.pth`.

    `CheckpointError` if there is no such file, it does not fit its network exactly or is shipped and has changed.
    """
    path = find_weights(name_or_path)
    check_shipped(path)
    if path.suffix == ".safetensors":
        info = read_info(path)
        if "privileged" in info:
            raise CheckpointError(f"{path}: a teacher, which needs the truth to restore; use the net_g beside it")
        if info["network"]["type"] in CLASSIFIERS:
            raise CheckpointError(f"{path}: a classifier of clips ({info['network']['type']}), which restores nothing")
        network, state = build_network(info["network"], path, ARCHS), _read_safetensors(path)
        load_state(network, state, path)
    else:
        state = _read_pth(path)
        network = _recognise(state, path)
        load_published(network, state, path)
    return network.to(device=device, dtype=dtype).eval()


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """The file behind a shipped model's name or a path."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = WEIGHTS / f"{name_or_path}.safetensors"
    if len(path.parts) == 1 and not path.suffix and shipped.is_file():
        return shipped
    raise CheckpointError(
        f"{name_or_path}: neither a file nor a shipped model; shipped models: {', '.join(shipped_models()) or 'none'}"
    )


def check_shipped(path: Path) -> None:
    """Raise `CheckpointError` for a file among the shipped ones that is not, bit for bit, the one that was shipped."""
    if path.resolve().parent == WEIGHTS.resolve() and (fault := manifest.fault(path)):
        raise CheckpointError(
            f"{path}: {fault}; fetch it anew (git checkout, or install the package again), or keep a network of your "
            "own in another folder and give its path"
        )


def build_network(network: Mapping[str, Any], path: Path, table: Mapping[str, type[Network]]) -> Network:
    """The network that a file's metadata describes: ``{"type": name, **constructor arguments}``, random weights.

    ``table`` is `ARCHS` or `CLASSIFIERS`.
    """
    # JSON has no tuples
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in network.items()}
    name = str(arguments.pop("type", None))
    if name not in table:
        raise CheckpointError(f"{path}: unknown architecture {name!r}; this version knows {', '.join(table)}")
    try:
        return table[name](**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its metadata does not build a {name}: {error}") from error


def save_network(path: str | os.PathLike[str], network: nn.Module, description: Mapping[str, Any], **info: Any) -> None:
    """Write weights and metadata atomically.

    ``description`` is ``{"type": name, **constructor arguments}``; ``info`` is anything JSON can hold (iteration,
    validation figures, licence, ...). Weights keep their dtype.
    """
    metadata = {"network": json.dumps(dict(description)), "info": json.dumps(info)}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    with replacing(Path(path)) as temporary:  # by way of memory, so that a full disk is an OSError as everywhere
        temporary.write_bytes(safetensors.torch.save(state, metadata))


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.pth`: bare or wrapped, with or without `module.`, without code."""
    path = Path(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``{"network": {...}, **info}`` from the metadata of a safetensors file of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    try:
        network, info = json.loads(metadata.get("network", "null")), json.loads(metadata.get("info", "{}"))
    except json.JSONDecodeError:
        network, info = None, {}
    if not (isinstance(network, dict) and isinstance(network.get("type"), str) and isinstance(info, dict)):
        raise CheckpointError(
            f"{path}: its metadata names no architecture, so it was not written by this project; "
            "convert it with save_network"
        )
    return {"network": network, **info}


def load_state(network: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy ``state`` into ``network`` strictly; `CheckpointError` lists missing, unexpected and misshapen keys."""
    _compare({key: tensor.shape for key, tensor in network.state_dict().items()}, state, path)
    network.load_state_dict(dict(state))


def load_to_start(network: VideoNet, name_or_path: str | os.PathLike[str]) -> list[str]:
    """Copy weights into ``network`` to go on training from; they may lack parts that it `added`, which stay fresh.

    Returns the keys that stayed fresh. `CheckpointError` for anything else that is missing or does not fit.
    """
    state = load_network(name_or_path).state_dict()
    fresh = [key for key in network.state_dict() if key.startswith(network.added) and key not in state]
    whole = {**{key: network.state_dict()[key] for key in fresh}, **state}
    load_state(network, whole, name_or_path)
    return fresh


def load_published(network: VideoNet, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy a published STDAN state_dict into ``network``: keys mapped, deterministic buffers dropped, else strict."""
    weights = {key: tensor for key, tensor in state.items() if not key.endswith(DETERMINISTIC)}
    ours = {published_key(key): key for key in network.state_dict()}
    _compare({key: network.state_dict()[name].shape for key, name in ours.items()}, weights, path)
    network.load_state_dict({ours[key]: tensor for key, tensor in weights.items()})


def export_published(network: VideoNet, *, size: int = 32) -> dict[str, Tensor]:
    """The published state_dict of an STDAN, buffers included (the masks for the training size ``size``)."""
    state = {published_key(key): tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if not isinstance(module, ResidualSwinGroup):
            continue
        for i, block in enumerate(module.blocks):
            assert isinstance(block, SwinBlock)
            prefix, window = published_key(f"{name}.blocks.{i}."), block.attention.window
            state[prefix + DETERMINISTIC[0]] = relative_positions(window)
            if block.shift:
                state[prefix + DETERMINISTIC[1]] = shift_mask(size, size, window, block.shift, torch.device("cpu"))
    return state


DETERMINISTIC = ("attn.relative_position_index", "attn_mask")  # buffers that follow from the constructor

_ALIGN = {"pair": "offset_conv1", "offset": "offset_conv2", "refine": "offset_conv3", "fuse": "fea_conv"}
_DOWN = {"strided": "1", "plain": "2"}
_SIDE = {"first": "1", "second": "2"}

# our key -> published key: the first pattern that matches at the start of what is left is replaced, in this order
_PUBLISHED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"embed\.", "conv_first."),
    (r"encoder\.", "feature_extraction."),
    (r"decoder\.", "feature_recon."),
    (r"interpolate\.fuse_directions\.", "fusion_f_b."),
    (r"interpolate\.pyramid\.", "fea_"),
    (r"interpolate\.step\.pyramid\.", "pcd_align_modified.pcd_h.fea_"),
    (r"interpolate\.step\.align\.fuse\.", "pcd_align_modified.pcd_h.fusion."),
    (r"interpolate\.step\.align\.", "pcd_align_modified.pcd_h.pcd_align."),
    (r"interpolate\.step\.merge\.", "pcd_align_modified.fusion_1x1."),
    (r"interpolate\.step\.next(\d)\.", r"pcd_align_modified.conv_h\1."),
    (r"interpolate\.align\.fuse\.", "pcd_align_modified.fusion."),
    (r"interpolate\.align\.", "pcd_align_modified."),
    (r"aggregate\.embed\.", "stdfa.conv_first."),
    (r"aggregate\.(query|key|value)\.", lambda m: f"stdfa.qkv_maps.w_{m[1][0]}s."),
    (r"aggregate\.pair\.", "stdfa.deformable_corr.offset_conv1."),
    (r"aggregate\.refine\.", "stdfa.deformable_corr.offset_conv2."),
    (r"aggregate\.offsets\.conv\.", "stdfa.deformable_corr.dcn_attention.conv_offset_mask."),
    (r"aggregate\.project\.", "stdfa.conv_last."),
    (r"upsample\.before\.", "conv_before_upsample.0."),
    (r"upsample\.widen\.(\d+)\.", lambda m: f"upsample.{2 * int(m[1])}."),
    (r"upsample\.last\.", "conv_last."),
]
_PUBLISHED_PARTS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(?<=fea_)(strided|plain)\.(\d)\.", lambda m: f"L{int(m[2]) + 2}_conv{_DOWN[m[1]]}."),
    (r"align_(first|second)\.levels\.(\d)\.deform\.", lambda m: f"L{int(m[2]) + 1}_dcnpack_{_SIDE[m[1]]}."),
    (r"align_(first|second)\.levels\.(\d)\.(\w+)\.", lambda m: f"L{int(m[2]) + 1}_{_ALIGN[m[3]]}_{_SIDE[m[1]]}."),
    (r"dcnpack_(\d)\.offsets\.conv\.", r"dcnpack_\1.conv_offset."),
    (r"^(feature_\w+)\.embed\.", r"\1.conv_first."),
    (r"^(feature_\w+)\.norm_in\.", r"\1.patch_embed.norm."),
    (r"^(feature_\w+)\.norm_out\.", r"\1.norm."),
    (r"^(feature_\w+)\.after\.", r"\1.conv_after_body."),
    (r"^(feature_\w+)\.project\.", r"\1.conv_last."),
    (r"\.groups\.(\d+)\.blocks\.", r".layers.\1.residual_group.blocks."),
    (r"\.groups\.(\d+)\.conv\.", r".layers.\1.conv."),
    (r"\.attention\.position_bias$", ".attn.relative_position_bias_table"),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.project\.", ".attn.proj."),
    (r"\.widen\.(?=weight|bias)", ".mlp.fc1."),
    (r"\.narrow\.", ".mlp.fc2."),
]


def published_key(key: str) -> str:
    """The name that the published STDAN gives to our parameter ``key`` (source: its state_dict)."""
    for pattern, replacement in _PUBLISHED:
        key, count = re.subn("^" + pattern, replacement, key)
        if count:
            break
    for pattern, replacement in _PUBLISHED_PARTS:
        key = re.sub(pattern, replacement, key)
    return key


def _compare(expected: Mapping[str, torch.Size], given: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in given and given[key].shape != shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("other shape", misshapen)]
    problems = [f"{what} ({len(keys)}): {', '.join(keys)}" for what, keys in parts if keys]
    if problems:
        raise CheckpointError(f"{path}: weights of another network; " + "; ".join(problems))


def _recognise(state: Mapping[str, Tensor], path: Path) -> VideoNet:
    """The network whose published keys these are."""
    if "pcd_align_modified.fusion.weight" in state and "stdfa.conv_first.weight" in state:
        return ARCHS["stdan"]()
    raise CheckpointError(
        f"{path}: its keys belong to no network known here (the first: {', '.join(list(state)[:3])}); "
        "known published networks: STDAN"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def _read_pth(path: Path) -> dict[str, Tensor]:
    """A state_dict without code: bare or under one of the usual names, with or without `module.`."""
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: a TorchScript program, not a file of weights; take them out of it, if you trust it: "
            f'torch.save(torch.jit.load("{path}", "cpu").state_dict(), "weights.pth")'
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met: the file is bad in each case
        raise CheckpointError(f"{path}: not a readable file of weights ({type(error).__name__})") from error
    for key in ("params_ema", "params", "state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name, complete and on disk, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep colleagues out
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
