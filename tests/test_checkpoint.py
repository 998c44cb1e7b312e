"""Weights on disk: published files in and out, our own files, and what is refused in one line."""

import os
import pickle
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from seeded import published_parameters, published_shapes
from tiny import COMPACT, PUBLISHED, unchecked
from torch import Tensor

from archs import STDAN
from restore import checkpoint
from restore.checkpoint import (
    CheckpointError,
    export_published,
    find_weights,
    load_network,
    load_state,
    published_key,
    read_info,
    replacing,
    save_network,
    shipped_models,
)

DESCRIPTION = {"type": "stdan", **COMPACT}


@pytest.fixture
def network() -> STDAN:
    torch.manual_seed(0)
    return STDAN(**COMPACT)


@pytest.fixture
def saved(network, tmp_path) -> Path:
    path = tmp_path / "net.safetensors"
    save_network(path, network, DESCRIPTION, iteration=7, validation={"psnr_y": 25.5})
    return path


def refusal(path: str | Path) -> str:
    """The message with which a file is refused: one line that begins with its name."""
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    return message


# ---- the published network


def buffers() -> dict[str, Tensor]:
    """The 72 buffers of the published state_dict, by their definitions and one element after the other."""
    places = list(product(range(8), range(8)))
    index = torch.tensor([[(r - s + 7) * 15 + (c - d + 7) for s, d in places] for r, c in places])
    masks = []
    for top, left in product(range(0, 32, 8), range(0, 32, 8)):
        labels = [((top + r >= 24) + (top + r >= 28), (left + c >= 24) + (left + c >= 28)) for r, c in places]
        masks.append([[0.0 if one == other else -100.0 for other in labels] for one in labels])
    values = {"relative_position_index": index, "attn_mask": torch.tensor(masks)}
    kinds = {key: kind for key, (_, kind) in published_shapes().items()}
    return {key: values[key.rpartition(".")[2]] for key, kind in kinds.items() if kind == "buffer"}


def test_a_published_file_comes_in_and_goes_out(tmp_path):
    published = {**published_parameters(), **buffers()}
    torch.save(published, tmp_path / "STDAN.pth")
    network = load_network(tmp_path / "STDAN.pth")
    assert type(network) is STDAN and not network.training
    exported = export_published(network)
    assert len(exported) == 914 and exported.keys() == published_shapes().keys()
    for key, (shape, _) in published_shapes().items():
        assert tuple(exported[key].shape) == shape, key
        assert exported[key].dtype == published[key].dtype, key
        assert torch.equal(exported[key], published[key]), key


@pytest.fixture
def small(monkeypatch) -> dict[str, Tensor]:
    """The state_dict of a small published network, and for this test published files hold small ones."""
    monkeypatch.setattr(checkpoint, "ARCHS", {"stdan": lambda: STDAN(**PUBLISHED)})
    torch.manual_seed(0)
    return export_published(STDAN(**PUBLISHED))


def test_masks_for_another_size():
    exported = export_published(STDAN(**PUBLISHED), size=16)
    masks = {key: tensor for key, tensor in exported.items() if key.endswith("attn_mask")}
    assert {tuple(mask.shape) for mask in masks.values()} == {(4, 64, 64)} and len(masks) == 1


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "params_ema", "params", "state_dict"])
def test_wrapped_published_files(small, wrapper, prefix, tmp_path):
    """A prefix before every key, and one level down in a larger file, where averaged weights come first."""
    state = {f"{prefix}{key}": tensor for key, tensor in small.items()}
    others = {"epoch": 3, "params": {"x": torch.zeros(1)}} if wrapper == "params_ema" else {"epoch": 3}
    torch.save({wrapper: state, **others} if wrapper else state, tmp_path / "net.pth")
    loaded = export_published(load_network(tmp_path / "net.pth"))
    assert loaded.keys() == small.keys()
    for key, tensor in small.items():
        assert torch.equal(loaded[key], tensor), key


def test_published_weights_without_the_buffers(small, tmp_path):
    suffixes = ("relative_position_index", "attn_mask")
    torch.save({key: t for key, t in small.items() if not key.endswith(suffixes)}, tmp_path / "net.pth")
    loaded = export_published(load_network(tmp_path / "net.pth"))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in small.items())


def test_every_key_has_one_published_name():
    ours = STDAN(**PUBLISHED).state_dict()
    assert len({published_key(key) for key in ours}) == len(ours)


def test_a_published_file_that_does_not_fit(small, tmp_path):
    state = {key: tensor for key, tensor in small.items() if key not in ("conv_last.bias", "fusion_f_b.weight")}
    state["conv_first.weight"] = torch.zeros(8, 3, 5, 5)
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth")
    assert "missing (2): conv_last.bias, fusion_f_b.weight" in message
    assert "unexpected (1): extra.weight" in message
    assert "other shape (1): conv_first.weight (8, 3, 5, 5) instead of (8, 3, 3, 3)" in message


# ---- files of ours


def test_what_is_saved_comes_back(network, saved):
    loaded = load_network(saved)
    assert not loaded.training and loaded.multiple_of == network.multiple_of
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    info = read_info(saved)
    assert info == {
        "network": {key: list(v) if isinstance(v, tuple) else v for key, v in DESCRIPTION.items()},
        "iteration": 7, "validation": {"psnr_y": 25.5},
    }  # fmt: skip


def test_weights_keep_their_type_on_disk_and_take_another_on_loading(network, tmp_path):
    save_network(tmp_path / "net.safetensors", network.to(torch.bfloat16), DESCRIPTION)
    assert (tmp_path / "net.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in network.parameters()) + 20_000
    assert load_network(tmp_path / "net.safetensors").skip is not None
    assert load_network(tmp_path / "net.safetensors").embed.weight.dtype == torch.float32
    half = load_network(tmp_path / "net.safetensors", dtype=torch.bfloat16)
    assert torch.equal(half.embed.weight, network.embed.weight)


def test_other_weights_are_listed(network, tmp_path):
    state = network.state_dict()
    state["embed.bias"], state["stranger"] = torch.zeros(9), state.pop("embed.weight")
    with pytest.raises(CheckpointError) as caught:
        load_state(network, state, "a.safetensors")
    assert str(caught.value) == (
        "a.safetensors: weights of another network; missing (1): embed.weight; unexpected (1): stranger; "
        "other shape (1): embed.bias (9,) instead of (8,)"
    )


def test_metadata_of_another_network(network, tmp_path):
    save_network(tmp_path / "net.safetensors", network, {**DESCRIPTION, "channels": 16})
    assert "embed.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)" in refusal(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"type": "edvr"}, "unknown architecture 'edvr'; this version knows stdan"),
        ({}, "names no architecture"),
        ({**DESCRIPTION, "chanels": 8}, "does not build a stdan: .*chanels"),
        ({**DESCRIPTION, "heads": 3}, "does not build a stdan: embed_dim=8 does not divide by heads=3"),
        ({**DESCRIPTION, "skip": "bilinear"}, "does not build a stdan: skip='bilinear'"),
    ],
)
def test_metadata_that_builds_nothing(network, description, message, tmp_path):
    save_network(tmp_path / "net.safetensors", network, description)
    with unchecked(), pytest.raises(CheckpointError, match=message) as caught:
        load_network(tmp_path / "net.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", ["STDAN, large", '"stdan"', "[8]", "null", '{"type": {}}'])
def test_metadata_that_is_no_description(metadata, tmp_path):
    """Others may use the same name for theirs."""
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"network": metadata})
    with unchecked():
        refusal(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("arguments", [{"channels": -8}, {"heads": 0}, {"window": -8}, {"encoder_depths": [-1]}])
def test_sizes_that_no_network_has(network, arguments, tmp_path):
    save_network(tmp_path / "net.safetensors", network, {**DESCRIPTION, **arguments})
    refusal(tmp_path / "net.safetensors")


# ---- damaged and foreign files


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_a_truncated_file(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[:length])
    assert "not a complete safetensors file" in refusal(saved)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_random_bytes(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(bytes(torch.randint(256, (3000,), generator=torch.Generator().manual_seed(0)).tolist()))
    refusal(path)
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes())  # a header longer than any file
    refusal(path)


def test_a_safetensors_file_of_others(network, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors")
    assert "its metadata names no architecture" in refusal(tmp_path / "net.safetensors")


def test_published_weights_of_others(tmp_path):
    torch.save({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)}, tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth")
    assert "conv.weight, conv.bias" in message and "known published networks: STDAN" in message


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(2)], ids=["list", "numbers", "tensor"])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    assert "holds no state_dict of tensors" in refusal(tmp_path / "net.pth")


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_with_code_in_it_is_not_run(save, tmp_path):
    save({"params": _Malicious(tmp_path / "broken_in")}, tmp_path / "net.pth")
    assert "not a readable file of weights" in refusal(tmp_path / "net.pth")
    assert not (tmp_path / "broken_in").exists()


# ---- names


def test_an_unknown_name_lists_the_shipped_models(ship):
    assert refusal("stdan_xxl").endswith("neither a file nor a shipped model; shipped models: none")
    for name in ("stdan_s", "a_net"):
        path = ship(name, COMPACT)
    path.with_name("notes.txt").write_text("no model")
    assert shipped_models() == ["a_net", "stdan_s"]
    assert refusal("stdan_xxl").endswith("shipped models: a_net, stdan_s")
    assert find_weights("stdan_s") == path.with_name("stdan_s.safetensors")
    assert isinstance(load_network("stdan_s"), STDAN)
    for name in ("folder/stdan_s", "../stdan_s", "stdan_s.pth", path.parent):
        refusal(name)


def test_an_altered_shipped_file_is_refused(ship, tmp_path):
    """One bit of one weight, which the format itself does not notice; and only where files are shipped."""
    path = ship("a_net", COMPACT)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for name in ("a_net", path):
        with pytest.raises(CheckpointError, match=r"a_net.safetensors: damaged or altered: .*SHA256SUMS; fetch"):
            load_network(name)
    assert load_network(path.replace(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "SHA256SUMS: cannot be read"),
        ("", "SHA256SUMS beside it does not name it"),
        ("no hash\n", "SHA256SUMS: has a line that is not a hash and a name"),
    ],
)
def test_a_manifest_that_is_of_no_use(ship, text, fault):
    path = ship("a_net", COMPACT)
    manifest = path.with_name("SHA256SUMS")
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(CheckpointError, match=fault):
        load_network("a_net")


def test_shipped_weights_load():
    """Whatever lies in restore/weights is complete and fits this version."""
    for name in shipped_models():
        assert not load_network(name).training


# ---- replacing files


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new folder" / "a.bin"
    with replacing(target) as temporary:
        assert temporary.parent == target.parent and not target.exists()
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_interrupted_write_leaves_everything_as_it_was(error, old, tmp_path):
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(error), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask, mode, network, tmp_path):
    before = os.umask(umask)
    try:
        save_network(tmp_path / "net.safetensors", network, DESCRIPTION)
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == mode
