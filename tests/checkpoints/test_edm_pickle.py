import hashlib
import io
import json
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_pickles import Persistent, edms_modules, filled, layer, theirs, write_edm
from network_tools import noise

from stillhouse.checkpoints import EDMPickle, load_weights
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM, VE, VP
from stillhouse.networks import DhariwalUNet, EDM2UNet, SongUNet
from stillhouse.networks.layers import Downsample

NCSNPP = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
SMALL = {"model_channels": 16, "channel_mult": (1, 2, 2), "num_blocks": 1, "attn_resolutions": (8,), "augment_dim": 9}
ADM = {"model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
CONSTANTS = {
    "EDMPrecond": {"sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000},
    "VEPrecond": {},
    "Precond": {"sigma_data": 0.5},
}


def build(kind: str = "ddpmpp", **options):
    torch.manual_seed(5)
    options = {"num_classes": 4, **options}
    if kind == "adm":
        return DhariwalUNet(16, 3, 3, **{**ADM, **options}).eval()
    if kind == "edm2":
        return EDM2UNet(16, 3, 3, **{**ADM, **options}).eval()
    return SongUNet(16, 3, 3, **{**SMALL, **(NCSNPP if kind == "ncsnpp" else {}), **options}).eval()


def write(
    path: Path, network, precond: str = "EDMPrecond", change=None, model: str | None = None, **attributes
) -> Path:
    tensors = filled(theirs(network))
    if precond != "Precond":  # EDM2 has its filter in no tensor
        kernel = next(m.kernel for m in network.modules() if isinstance(m, Downsample))
        tensors["enc.8x8_down.conv0.resample_filter"] = kernel.clone()
    if change:
        change(tensors)
    have = {"img_resolution": 16, "img_channels": 3, "label_dim": 4, "use_fp16": False, **CONSTANTS.get(precond, {})}
    name = "UNet" if isinstance(network, EDM2UNet) else type(network).__name__
    return write_edm(path, tensors, precond, model or name, **{**have, **attributes})


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("edm") / "small.pkl", build())


@pytest.mark.parametrize(
    ("kind", "precond", "preconditioning", "expected"),
    [
        ("ddpmpp", "EDMPrecond", EDM, [0.42019, -0.98356, -0.74146, 0.22111, 0.3451, -0.08993, 0.04045, 0.04146]),
        ("ddpmpp", "VPPrecond", VP, [0.14272, -0.96815, -0.64558, 0.09472, -8.93018, 17.28898, -22.23609, -20.15079]),
        ("ncsnpp", "VEPrecond", VE, [0.57284, -1.23571, -0.94431, 0.32365, 6.96432, 14.75768, -7.47699, -13.67039]),
        ("adm", "EDMPrecond", EDM, [0.11058, -0.98265, -0.757, 0.19084, -0.28734, 0.11602, -0.23425, -0.04916]),
        ("edm2", "Precond", EDM, [0.24178, -0.76165, -0.4972, 0.15486, 0.11039, 0.54271, -0.49549, -0.07726]),
    ],
)
def test_a_files_denoiser_is_that_of_edms_own_code(tmp_path, kind, precond, preconditioning, expected):
    """`expected`: 8 pixels that the preconditioned networks of NVlabs/edm (008a4e5) and edm2 (4bf8162) make of these weights."""
    network = build(kind)
    file = write(tmp_path / "net.pkl", network, precond)
    EDMPickle(str(file)).provide(str(tmp_path / "net.safetensors"), network, preconditioning(), "test")
    load_weights(tmp_path / "net.safetensors", network)
    sigma = torch.tensor([0.3, 20.0])
    x = noise(1, 2, 3, 16, 16) * (0.5 + sigma.view(-1, 1, 1, 1))
    with torch.no_grad():
        out = Denoiser(network, preconditioning())(x, sigma, torch.tensor([3, 1]))
    pixels = out.flatten(1)[:, [0, 17, 391, 767]].flatten()
    torch.testing.assert_close(pixels, torch.tensor(expected), rtol=1e-5, atol=3e-5)
    assert not {"torch_utils", "dnnlib"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("options", "count", "parameters", "digest"),
    [
        ({}, 417, 55_733_891, "2de490acbe7d24e0dea46210e29d0c87f128a0b9ced15da13f4ede581ec4a73f"),
        ({"num_classes": 10}, 419, 55_735_299, "253a28f75ef1e39f1d02e08a3b684b95fbf6b4bf028ff36d592a11e6fe298f43"),
        (NCSNPP, 422, 56_397_827, "baf2ce05c48328c286a5fc4c694ee34bd3505b2a579906937e174a5cc85b426d"),
        (
            {**NCSNPP, "num_classes": 10},
            424,
            56_400_643,
            "77e586099bbf6d855fcfdf78ab9213a47753e8bb288d31f4845de69862b55732",
        ),
        (
            {"resolution": 64, "channel_mult": (1, 2, 2, 2)},
            541,
            61_805_571,
            "eafc6dd98eb129bff294bd7895b8096fbfaa997c4f8dba9de34e088ecac0caae",
        ),
        (
            {**NCSNPP, "resolution": 64, "channel_mult": (1, 2, 2, 2)},
            548,
            62_761_091,
            "84187329e71f1514d237f2ceaed3b902fe5378bec5594b027b53182d75b85c1f",
        ),
        (
            {"channel_mult": (1, 2, 2, 2), "augment_dim": 0},
            540,
            61_804_419,
            "d1c8b638f641a4a91ba2db3e62c245ad380ccef55cd0565c08c298f9d958369e",
        ),
        (
            {**NCSNPP, "channel_mult": (1, 2, 2, 2), "augment_dim": 0},
            547,
            62_758_787,
            "7a9fdba9c081e7db7a5912830515376c65eb6323878643cc8ab5c73ac1dfd6dd",
        ),
        (
            {"resolution": 64, "num_classes": 1000},
            541,
            295_899_267,
            "ed74a3528469d08d444cc1f28218fa21c9938f0dfeb4294199ead1e270b65ac5",
        ),
    ],
    ids=["cifar10", "cond", "ve", "cond_ve", "ffhq64", "ffhq64_ve", "baseline_vp", "baseline_ve", "imagenet64"],
)
def test_parameter_names_and_shapes_equal_edms_published_architectures(options, count, parameters, digest):
    """`digest`: SHA-256 over the sorted lines "name (shape)" of parameters and Fourier frequencies in EDM's code (008a4e5)."""
    kind = DhariwalUNet if options.get("num_classes") == 1000 else SongUNet
    common = {"resolution": 32, "in_channels": 3, "out_channels": 3}
    with torch.device("meta"):
        network = kind(**{**common, **({"augment_dim": 9} if kind is SongUNet else {}), **options})
    assert sum(p.numel() for p in network.parameters()) == parameters
    listing = theirs(network)
    assert len(listing) == len(network.state_dict()) == count
    text = "\n".join(f"{name} {shape}" for name, shape in sorted(listing.items()))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_weights_card_says_where_they_come_from(published, tmp_path):
    weights = tmp_path / "folder/small.safetensors"
    EDMPickle(str(published), url="https://somewhere/small.pkl").provide(
        str(weights), build(), EDM(), "CC-BY-NC-SA-4.0"
    )
    assert json.loads(weights.with_suffix(".json").read_text()) == {
        "source": {
            "file": "small.pkl",
            "sha256": hashlib.sha256(published.read_bytes()).hexdigest(),
            "url": "https://somewhere/small.pkl",
            "class": "EDMPrecond of SongUNet",
        },
        "licence": "CC-BY-NC-SA-4.0",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    before = weights.stat().st_mtime_ns
    EDMPickle("nowhere/small.pkl").provide(str(weights), build(), EDM(), "")  # they are there
    assert weights.stat().st_mtime_ns == before
    assert len(list(weights.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("network", "preconditioning", "message"),
    [
        (lambda: build("adm"), EDM, "network='SongUNet', the configured teacher 'DhariwalUNet'"),
        (lambda: build(num_classes=10), EDM, "network.num_classes=4, the configured teacher 10"),
        (lambda: build(num_classes=0), EDM, "network.num_classes=4, the configured teacher 0"),
        (build, VP, "preconditioning='EDM', the configured teacher 'VP'"),
        (build, lambda: EDM(0.6), "preconditioning.sigma_data=0.5, the configured teacher 0.6"),
        (lambda: build(resample_filter=(1, 3, 3, 1)), EDM, "resample_filter, of taps=2, the configured teacher 4"),
        (
            lambda: build(num_blocks=2),
            EDM,
            r"missing: decoder.16.blocks.2.conv_in.bias, .* and \d+ more; of another shape",
        ),
        (lambda: build(attn_resolutions=()), EDM, "unexpected: dec.8x8_block1.norm2.bias"),
        (lambda: build(model_channels=32), EDM, r"of another shape: decoder.16.* instead of "),
        (
            lambda: torch.nn.Linear(1, 1),
            EDM,
            "holds a SongUNet or a DhariwalUNet of EDM, or a UNet of EDM2, not a Linear",
        ),
    ],
)
def test_a_file_of_another_teacher_is_refused(published, tmp_path, network, preconditioning, message):
    with pytest.raises(ValueError, match=message) as caught:
        EDMPickle(str(published)).provide(str(tmp_path / "small.safetensors"), network(), preconditioning(), "")
    assert str(caught.value).startswith(str(published))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_the_file_says_of_itself_is_checked(tmp_path):
    wide = build("adm", channels_per_head=32)
    source = EDMPickle(str(write(tmp_path / "adm.pkl", wide)))
    with pytest.raises(ValueError, match="network.channels_per_head=64, the configured teacher 32"):
        source.read(tmp_path / "adm.pkl", wide, EDM())
    for name, change, attributes, error, message in (
        ("iDDPMPrecond", None, {}, ValueError, "holds a iDDPMPrecond; EDMPrecond, EDM"),
        ("VPPrecond", None, {"M": 500}, ValueError, "preconditioning.timesteps=500, the configured teacher 1000"),
        ("VPPrecond", lambda t: t.pop("map_layer0.bias"), {}, None, None),
        ("VPPrecond", None, {"_modules": {}}, OSError, "another layout than EDM's networks (it has no model)"),
    ):
        network, file = build(), tmp_path / "other.pkl"
        write(file, network, name, change, **attributes)
        if error is None:
            state, _ = EDMPickle(str(file)).read(file, network, VP())
            assert state.keys() == network.state_dict().keys() - {"embed.layer1.bias"}
            continue
        if "_modules" in attributes:
            _without_model(file)
        with pytest.raises(error, match=re.escape(message)):
            EDMPickle(str(file)).read(file, network, VP())


@pytest.mark.parametrize(
    ("where", "attributes", "error", "message"),
    [
        (
            "model",
            {"_parameters": [1]},
            OSError,
            "another layout than EDM's networks (the layer '' has a list of tensors)",
        ),
        ("model", {"_parameters": {"a": 1}}, OSError, "another layout than EDM's networks (a parameter is a int)"),
        (
            "model",
            {"_modules": {"enc": 5}},
            OSError,
            "another layout than EDM's networks (what should be a layer is none)",
        ),
        ("model", {"_modules": [1]}, OSError, "another layout than EDM's networks (a layer has no list of layers)"),
        (
            "ema",
            {"sigma_data": torch.zeros(3)},
            ValueError,
            "preconditioning.sigma_data=tensor([0., 0., 0.]), the configured",
        ),
        (
            "ema",
            {"img_resolution": [1] * 9000},
            ValueError,
            "network.resolution=[1, 1, 1, 1, 1, 1, ...], the configured",
        ),
        (
            "model",
            {"_parameters": {"a\nb" * 900: torch.nn.Parameter(torch.zeros(2))}},
            ValueError,
            r"unexpected: a\nba\nb",
        ),
    ],
)
def test_odd_layers_are_named(tmp_path, where, attributes, error, message):
    network, file = build(), tmp_path / "odd.pkl"
    net = layer({}, "EDMPrecond", img_resolution=16, img_channels=3, label_dim=4, sigma_data=0.5)
    net.attributes["_modules"]["model"] = layer(filled(theirs(network)), "SongUNet")
    {"ema": net, "model": net.attributes["_modules"]["model"]}[where].attributes.update(attributes)
    with edms_modules():
        file.write_bytes(pickle.dumps({"ema": net}))
    with pytest.raises(error, match=re.escape(message)) as caught:
        EDMPickle(str(file)).provide(str(tmp_path / "odd.safetensors"), network, EDM(), "")
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (1, 3072), (3072, 1), (3, 32, 32)])
def test_weights_of_odd_shapes_are_named(tmp_path, shape):
    name = next(name for name in theirs(build()) if name.endswith("qkv.weight"))
    file = write(tmp_path / "odd.pkl", build(), change=lambda t: t.update({name: torch.zeros(shape)}))
    with pytest.raises(
        ValueError, match="does not fit this SongUNet: of another shape: .*qkv.weight .* instead of .96, 32."
    ):
        EDMPickle(str(file)).provide(str(tmp_path / "odd.safetensors"), build(), EDM(), "")


def _without_model(file: Path) -> None:
    state = {"_modules": {}, "beta_d": 19.9, "beta_min": 0.1, "M": 1000}
    with edms_modules():
        file.write_bytes(pickle.dumps({"ema": Persistent("VPPrecond", state)}))


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def edms(**content) -> bytes:
    with edms_modules():
        return pickle.dumps({"ema": Persistent("EDMPrecond", content)})


def tensor(size: tuple, stride: tuple, offset: int = 0, storage: bytes | None = None) -> bytes:
    if storage is None:
        stream = io.BytesIO()
        torch.save(torch.zeros(4)._typed_storage(), stream, _use_new_zipfile_serialization=False)
        storage = stream.getvalue()
    values = Calls(torch.storage._load_from_bytes, storage)
    return edms(x=Calls(torch._utils._rebuild_tensor_v2, values, offset, size, stride, False, {}))


def enlarged() -> bytes:
    """A storage that says that it has 2^40 values."""
    stream = io.BytesIO()
    torch.save(torch.zeros(4)._typed_storage(), stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue().replace(b"cpuq\x03K\x04", b"cpuq\x03\x8a\x06" + struct.pack("<Q", 1 << 40)[:6])
    return data[:-24] + struct.pack("<q", 1 << 40) + data[-16:]


def cyclic() -> bytes:
    outer = torch.nn.ModuleDict()
    outer._modules["model"] = outer
    with edms_modules():
        return pickle.dumps({"ema": Persistent("EDMPrecond", {"sigma_data": 0.5, "_modules": {"model": outer}})})


HOSTILE = {
    "os.system": (lambda: pickle.dumps(Calls(os.system, "touch executed")), "posix.system"),
    "in a state": (lambda: edms(x=[{"y": Calls(os.system, "touch executed")}]), "posix.system"),
    "eval": (lambda: edms(x=Calls(eval, "open('executed', 'w')")), "builtins.eval"),
    "getattr": (lambda: edms(x=Calls(getattr, "", "join")), "builtins.getattr"),
    "protocol 0": (lambda: b"cos\nsystem\n(S'touch executed'\ntR.", "os.system"),
    "inst": (lambda: b"(S'touch executed'\nios\nsystem\n.", "the instruction STRING"),
    "call of a result": (lambda: b"\x80\x04})R.", "a call of dict"),
    "numpy array": (
        lambda: edms(x=Calls(np.zeros(1).__reduce__()[0], np.ndarray, (1 << 40,), b"b")),
        "multiarray._reconstruct",
    ),
    "long": (lambda: b"\x80\x04\x8b" + struct.pack("<i", 4) + b"\1\1\1\1.", "the instruction LONG4"),
    "too many": (lambda: b"\x80\x04" + b"N" * (1 << 20) + b".", "more than 1048576 instructions"),
}
DAMAGED = {
    "bytearray8": (lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", "bytes are announced where 1 are left"),
    "binbytes8": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "bytes are announced"),
    "long4": (lambda: b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b".", "bytes are announced"),
    "nothing": (lambda: b"", "bytes are announced where 0 are left"),
    "memo": (lambda: b"\x80\x04Nr" + struct.pack("<I", (1 << 32) - 1) + b"j" + struct.pack("<I", 7) + b".", "7"),
    "nested key": (lambda: b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", "a tuple as a key"),
    "huge tensor": (lambda: tensor((1 << 20, 1 << 20), (0, 0)), "a tensor of 1099511627776 values reaches beyond"),
    "too far": (lambda: tensor((2, 2), (2, 1), offset=1), "a tensor of 4 values reaches beyond its storage"),
    "negative": (lambda: tensor((2,), (-1,), offset=1), "a tensor of impossible shape"),
    "huge storage": (lambda: tensor((4,), (1,), storage=enlarged()), "a storage of 1099511627776 values in 16 bytes"),
    "cycle": (cyclic, "a layer is held twice"),
    "text": (lambda: b"<html>not found</html>", "opcode b'<'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_wants_more_than_data_is_refused_and_nothing_is_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[name]
    file = tmp_path / "evil.pkl"
    file.write_bytes(make())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        EDMPickle(str(file)).read(file, build(), EDM())
    assert str(caught.value).startswith(f"{file} was refused: it has ")
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_makes_no_sense_is_refused_within_its_own_size(name, tmp_path):
    make, message = DAMAGED[name]
    file = tmp_path / "broken.pkl"
    file.write_bytes(make())
    with pytest.raises(OSError, match=re.escape(message)) as caught:
        EDMPickle(str(file)).read(file, build(), EDM())
    assert str(caught.value).startswith(f"{file} ")
    assert str(caught.value).endswith("fetch it again")
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_anywhere_or_of_another_hash_is_refused(published, tmp_path):
    content = published.read_bytes()
    file = tmp_path / "cut.pkl"
    for length in range(1, len(content), len(content) // 12):
        file.write_bytes(content[:length])
        with pytest.raises(OSError, match="is damaged, cut short or no pickle"):
            EDMPickle(str(file)).read(file, build(), EDM())
    source = EDMPickle(str(published), sha256="0" * 64)
    with pytest.raises(OSError, match="small.pkl has SHA-256 .*, expected 0{64}; delete and fetch it again"):
        source.provide(str(tmp_path / "small.safetensors"), build(), EDM(), "")
    file.write_bytes(pickle.dumps({"net": 1}))
    with pytest.raises(ValueError, match="holds no averaged network"):
        EDMPickle(str(file)).read(file, build(), EDM())
