"""STDAN-freq: off it is STDAN, fresh it is STDAN, awake every component learns; cost; weights of STDAN fine-tune."""

import pytest
import torch
from runs import OPTIONS, run
from tiny import COMPACT, FREQUENCY, FUSION, PUBLISHED, RECURRENT, seeded_clip, unchecked

from archs import STDAN, STDANFreq
from restore.checkpoint import CheckpointError, load_to_start, save_network
from restore.cost import count_gmac, count_parameters

OFF = {"enhance": None, "guide": False, "prior": False, "location": False, "bands": None, "channel": False}
COMPONENTS = {
    "enhance": {"enhance": "radial"},
    "guide": {"guide": True},
    "prior": {"prior": True},
    "motion_branch": {"motion_branch": "explicit"},
    "location": {"location": True},
    "bands": {"bands": "polar"},
    "channel": {"channel": True},
    "dct_condition": {"dct_condition": True},
}


def pair(**components) -> tuple[STDAN, STDANFreq]:
    """STDAN and STDAN-freq with the same weights where both have them."""
    torch.manual_seed(0)
    plain = STDAN(**PUBLISHED).eval()
    freq = STDANFreq(**PUBLISHED, **components).eval()
    assert not freq.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    return plain, freq


def test_all_off_is_stdan_bit_for_bit():
    plain, freq = pair(**OFF)
    assert list(freq.state_dict()) == list(plain.state_dict())
    clip = seeded_clip(1, 3, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(freq(clip), plain(clip))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_fresh_component_changes_nothing(component, training):
    plain, freq = pair(**{**OFF, **COMPONENTS[component]})
    clip = seeded_clip(2, 2, 3, 16, 24)
    results = []
    for network in (plain, freq):
        torch.manual_seed(1)  # stochastic depth
        with torch.no_grad():
            results.append(network.train(training)(clip))
    assert (results[0] - results[1]).abs().max() < 1e-5
    assert set(freq.state_dict()) > set(plain.state_dict())


def test_everything_fresh_changes_nothing():
    plain, freq = pair(**FUSION, dct_condition=True)
    clip = seeded_clip(1, 3, 3, 16, 16)
    with torch.no_grad():
        assert (plain(clip) - freq(clip)).abs().max() < 1e-5


def test_every_new_parameter_learns_within_three_steps():
    torch.manual_seed(0)
    network = STDANFreq(**{**FREQUENCY, "motion_branch": "distilled"}).train()
    new = {name for name, _ in network.named_parameters() if name.startswith(network.added)}
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    asleep = set(new)
    for step in range(3):
        optimizer.zero_grad()
        clip = seeded_clip(1, 3, 3, 16, 16, seed=step)
        loss = (network(clip) - seeded_clip(1, 5, 3, 64, 64, seed=step)).abs().mean()
        (loss + 1e-3 * sum(network.auxiliary_losses().values())).backward()
        asleep -= {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not asleep
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_cost_is_within_the_design():
    """Parameters + 2 %; multiply-adds below those of the published program, which has its mask convolution twice."""
    plain, freq = STDAN().eval(), STDANFreq(**FUSION).eval()
    added = count_parameters(freq) - count_parameters(plain)
    assert 0.017 < added / count_parameters(plain) < 0.02
    more = count_gmac(freq, 2, 16, 16) / count_gmac(plain, 2, 16, 16)
    assert 1 < more < 1.03


def test_compact_networks_take_what_they_have_a_place_for():
    clip = seeded_clip(1, 2, 3, 16, 16)
    recurrent = {**RECURRENT, **OFF, "enhance": "polar"}
    for arguments in ({**COMPACT, **FUSION}, {**COMPACT, "phase_start": True}, recurrent):
        with torch.no_grad():
            assert STDANFreq(**arguments).eval()(clip).shape == (1, 3, 3, 64, 64)
    for arguments, message in (
        (RECURRENT, "guide and prior belong into FeatureInterpolation: set between='lstfi'"),
        ({**RECURRENT, **OFF, "location": True}, "set exchange='attention'"),
        ({**PUBLISHED, "phase_start": True}, "set that, too"),
    ):
        with pytest.raises(ValueError, match=message):
            STDANFreq(**arguments)


def test_unknown_choices():
    for key in ("enhance", "guidance", "motion_branch", "bands", "logit"):
        with unchecked(), pytest.raises(ValueError, match="'strange' is none of"):
            STDANFreq(**{**PUBLISHED, **FUSION, key: "strange"})


def test_weights_of_stdan_start_it(tmp_path):
    plain, _ = pair(**OFF)
    path = tmp_path / "plain.safetensors"
    save_network(path, plain, {"type": "stdan", **PUBLISHED})
    freq = STDANFreq(**PUBLISHED, **FUSION)
    fresh = load_to_start(freq, path)
    assert fresh and all(key.startswith(freq.added) for key in fresh)
    assert torch.equal(freq.embed.weight, plain.embed.weight)
    wide = STDANFreq(**{**PUBLISHED, "channels": 16})
    with pytest.raises(CheckpointError, match="other shape"):
        load_to_start(wide, path)
    save_network(path, freq, {"type": "stdan_freq", **PUBLISHED, **FUSION})
    assert not load_to_start(freq, path)


def test_new_parts_fine_tune_at_their_own_rate(tmp_path):
    """Frozen weights of STDAN under new components, with one regular expression."""
    tiny = {"channels": 8, "embed_dim": 8, "heads": 1, "encoder_depths": (1,), "decoder_depths": (1,), "levels": 1,
            "deform_groups": 1, "drop_path": 0.0}  # fmt: skip
    path = tmp_path / "plain.safetensors"
    save_network(path, STDAN(**tiny), {"type": "stdan", **tiny})
    file = tmp_path / "tiny.yml"
    file.write_text(OPTIONS)
    described = {"type": "stdan_freq", **FUSION, **{k: list(v) if isinstance(v, tuple) else v for k, v in tiny.items()}}
    new = "^(enhance|interpolate.guidance|aggregate.fusion)"
    groups = f"[{{match: '{new}', lr_mult: 10}}, {{match: '.', freeze_until: 99}}]"
    folder = run(
        file, f"network_g={described}", f"path.pretrain_network_g={path}", f"train.param_groups={groups}",
        "train.total_iter=3", "train.ema_decay=0", "val.val_freq=null",
    )  # fmt: skip
    before, after = (STDANFreq(**tiny, **FUSION) for _ in range(2))
    load_to_start(before, path)
    load_to_start(after, folder / "models" / "net_g_3.safetensors")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed and all(name.startswith(after.added) for name in changed)
