import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.checkpoints import find_weights, hash_state, load_weights, save_weights
from stillhouse.checkpoints import weights as weights_module
from stillhouse.checkpoints.weights import hash_form
from stillhouse.diffusion.preconditioning import EDM, Epsilon
from stillhouse.networks import DhariwalUNet, SongUNet

CARD = {"command": "python train.py method=pretrain", "seed": 0}


class Net(nn.Module):
    def __init__(self, seed: int = 0, classes: int = 3):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 3)
        self.out = nn.Linear(4, classes)
        self.register_buffer("freqs", torch.randn(5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_weights(path, Net().state_dict(), CARD)
    return path


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_round_trip_with_card(saved):
    net = Net(seed=1)
    load_weights(saved, net)
    assert equal(net, Net())
    assert json.loads(saved.with_suffix(".json").read_text()) == {
        **CARD,
        "sha256": hashlib.sha256(saved.read_bytes()).hexdigest(),
    }
    assert sorted(p.name for p in saved.parent.iterdir()) == ["net.json", "net.safetensors"]


def test_a_network_with_fixed_filters_and_random_frequencies_comes_back(tmp_path):
    options = {"model_channels": 16, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,)}
    options |= {"embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
    first, second = SongUNet(8, 1, 1, **options), SongUNet(8, 1, 1, **options)
    first.to(memory_format=torch.channels_last)
    save_weights(tmp_path / "a.safetensors", first.state_dict(), CARD)
    load_weights(tmp_path / "a.safetensors", second)
    assert equal(first, second)


def test_half_precision_on_disk_becomes_the_modules_dtype(tmp_path):
    path = tmp_path / "half.safetensors"
    save_weights(path, {name: t.half() for name, t in Net().state_dict().items()}, CARD)
    net = Net(seed=1)
    load_weights(path, net)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert equal(net, Net().half().float())
    assert path.stat().st_size < 1000


def test_existing_weights_are_kept_unless_replacing_is_asked_for(saved):
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match=r"net\.safetensors exists already; move it away"):
        save_weights(saved, Net(seed=1).state_dict(), CARD)
    assert saved.read_bytes() == before
    save_weights(saved, Net(seed=1).state_dict(), {"seed": 1}, replace=True)
    net = Net()
    load_weights(saved, net)
    assert equal(net, Net(seed=1))
    assert json.loads(saved.with_suffix(".json").read_text())["seed"] == 1


def test_a_card_that_is_no_json_and_a_foreign_suffix_write_nothing(tmp_path):
    for card in ({"fid": float("nan")}, {"weights": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"the card of .*a\.safetensors cannot be written as JSON"):
            save_weights(tmp_path / "a.safetensors", Net().state_dict(), card)
    with pytest.raises(ValueError, match=r"saved as \.safetensors, got .*a\.pt"):
        save_weights(tmp_path / "a.pt", Net().state_dict(), CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["weights", "card"])
def test_a_full_disk_leaves_the_old_files(saved, fails):
    before = saved.read_bytes()
    limit, card = (200, CARD) if fails == "weights" else (4000, {"notes": "x" * 8000})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*net\.safetensors: .*; free some space"):
            save_weights(saved, Net(seed=1).state_dict(), card, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["net.json", "net.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"not json" + data[16:],
        lambda data: b"PK\x03\x04 a pickle of another program" * 20,
    ],
)
def test_damaged_files_are_named(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    net = Net(seed=1)
    with pytest.raises(
        OSError, match=r"net\.safetensors is damaged, .*; delete it and fetch or train it again"
    ) as caught:
        load_weights(saved, net)
    assert "\n" not in str(caught.value)
    assert equal(net, Net(seed=1))


def test_wrong_names_and_shapes_are_named_in_one_line_and_nothing_is_loaded(tmp_path):
    state = Net(classes=7).state_dict()
    state["extra"] = state.pop("freqs")
    save_weights(tmp_path / "a.safetensors", state, CARD)
    net = Net(seed=1)
    with pytest.raises(ValueError, match="does not fit this Net") as caught:
        load_weights(tmp_path / "a.safetensors", net)
    assert str(caught.value).endswith(
        "missing: freqs; unexpected: extra; of another shape: out.bias (7,) instead of (3,), "
        "out.weight (7, 4) instead of (3, 4); check the network's options"
    )
    assert equal(net, Net(seed=1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_of_16_bits_or_more_are_refused(tmp_path, dtype):
    path, state = tmp_path / "a.safetensors", Net().state_dict()
    save_weights(path, state | {"out.bias": state["out.bias"].to(dtype)}, CARD)
    net = Net(seed=1)
    with pytest.raises(
        ValueError, match="does not fit this Net: of another kind: out.bias .* instead of float32; check"
    ):
        load_weights(path, net)
    assert equal(net, Net(seed=1))


def test_many_wrong_names_are_counted(tmp_path):
    save_weights(tmp_path / "a.safetensors", {f"w{i}": torch.zeros(1) for i in range(9)}, CARD)
    with pytest.raises(ValueError, match="unexpected: w0, w1, w2, w3, w4 and 4 more"):
        load_weights(tmp_path / "a.safetensors", Net())


def test_the_files_hash_is_checked(saved):
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    load_weights(saved, Net(seed=1), sha256=digest.upper())
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1  # a flipped bit that the format itself cannot notice
    saved.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    net = Net(seed=1)
    with pytest.raises(OSError, match=f"has SHA-256 {found}, expected {digest}"):
        load_weights(saved, net, sha256=digest)
    assert equal(net, Net(seed=1))


def test_a_file_is_compared_with_its_card_a_long_one_in_some_blocks(saved, monkeypatch):
    load_weights(saved, Net(seed=1))
    for block, found in ((1 << 22, True), (64, None)):
        monkeypatch.setattr("stillhouse.checkpoints.block_hashes.BLOCK", block)
        save_weights(saved, Net().state_dict(), CARD, replace=True)
        assert ("blocks" in json.loads(saved.with_suffix(".json").read_text())) == (found is None)
        data = bytearray(saved.read_bytes())
        data[-1] ^= 1
        saved.write_bytes(data)
        with pytest.raises(
            OSError, match=r"damaged.* \(its SHA-256 is not that of net.json\); delete it and fetch or train"
        ):
            for _ in range(1 if found else 1000):
                load_weights(saved, Net(seed=1))
    saved.with_suffix(".json").unlink()  # a file from elsewhere has none
    load_weights(saved, Net(seed=1))


def test_relative_paths_are_sought_here_then_in_the_project(saved, tmp_path, monkeypatch):
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project, here):
        folder.mkdir()
    monkeypatch.setattr(weights_module, "PROJECT_ROOT", project)
    monkeypatch.chdir(here)
    (project / "a.safetensors").write_bytes(saved.read_bytes())
    assert find_weights("a.safetensors") == project / "a.safetensors"
    load_weights("a.safetensors", Net(seed=1))
    (here / "a.safetensors").write_bytes(saved.read_bytes())
    assert find_weights("a.safetensors") == here / "a.safetensors"
    assert find_weights(project / "a.safetensors") == project / "a.safetensors"


def test_the_project_is_the_folder_of_this_repository():
    assert (weights_module.PROJECT_ROOT / "stillhouse" / "checkpoints" / "weights.py").is_file()


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("no.safetensors", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"train some with `python train.py method=pretrain .*method=rectified_flow"
        ) as caught:
            load_weights(path, Net())
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "did you mean" not in str(caught.value)
    (tmp_path / "w").mkdir()
    for name in ("digits_teacher.pth", "digits_taecher.json", "clothes.pth"):
        (tmp_path / "w" / name).touch()
    with pytest.raises(FileNotFoundError, match=r" \(did you mean w/digits_teacher.pth\?\); train some with"):
        load_weights("w/digits_taecher.safetensors", Net())


def test_hash_is_that_of_names_shapes_and_values():
    state = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)}
    data = b"a()" + b"\x00\x00\x40\x40" + b"b(1, 2)" + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\x40"
    assert hash_state(state) == hashlib.sha256(data).hexdigest()
    assert hash_state(dict(reversed(state.items()))) == hash_state(state)
    assert hash_state({k: v.half() for k, v in state.items()}) == hash_state(state)
    assert hash_state(Net()) == hash_state(Net().state_dict())
    assert hash_state(Net().to(memory_format=torch.channels_last)) == hash_state(Net())


def test_form_names_what_the_weights_do_not():
    def unet(**options):
        options = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), **options}
        return SongUNet(8, 1, 1, num_classes=3, **options)

    def adm(heads):
        return DhariwalUNet(
            8, 1, 1, model_channels=32, channel_mult=(1, 1), attn_resolutions=(4,), channels_per_head=heads
        )

    with torch.device("meta"):
        forms = [adm(8), adm(16), unet(), unet(resample_filter=(1, 3, 3, 1))]
        assert unet().state_dict().keys() == unet(resample_filter=(1, 3, 3, 1)).state_dict().keys()
        assert hash_form(unet()) == hash_form(unet(label_dropout=0.1).eval())
        forms += [Epsilon(1000), Epsilon(1000, beta_end=0.01), EDM(0.5), EDM(0.6)]
        assert len(set(map(hash_form, forms))) == len(forms)


def test_hash_differs_with_any_change():
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    changes = [
        {**state, "a": torch.arange(6.0).reshape(2, 3)},
        {**state, "a": torch.arange(6.0).nextafter(torch.tensor(9.0))},
        {"a": state["b"], "b": state["a"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({hash_state(s) for s in [state, *changes]}) == 6
