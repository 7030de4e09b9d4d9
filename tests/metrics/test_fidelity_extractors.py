"""CLIP, DINOv2 and VGG16 through torch-fidelity's own classes, with random weights in the published files' format."""

from hashlib import sha256

import pytest
import torch
from extractor_files import write_clip, write_dinov2
from metric_stubs import SHAPE, Packed, Stub, sampler, stub_reference

from stillhouse.analysis.tables import records_text
from stillhouse.metrics.dinov2 import DINOv2
from stillhouse.metrics.evaluation import measure_sampler
from stillhouse.metrics.extractors import Inception, TorchFidelity
from stillhouse.metrics.fidelity import check_hub_name
from stillhouse.metrics.reference import reference_statistics

GENERATOR = torch.Generator().manual_seed(3)
# By side of the images: the entries 0, 100 and 383 of the features of two.
DINO = (
    (224, [-0.83776, 1.26514, -0.75626, 1.83283, -1.42259, 0.24116]),
    (56, [-0.86193, 1.14089, -0.74501, 1.70671, -1.10697, 0.45799]),
)
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip.pt")
    write_dinov2(folder / "dino.pth")
    return folder


def test_clip_is_torch_fidelitys(folder):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    extractor = TorchFidelity("clip-vit-b-32", folder / "clip.pt")
    theirs = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(folder / "clip.pt"))
    assert torch.equal(extractor(IMAGES), theirs(IMAGES)[0])
    assert extractor(IMAGES).shape == (3, extractor.dim) == (3, 24)
    grey = IMAGES[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert extractor(IMAGES).std(dim=0).mean() > 1e-3
    assert (extractor.name, extractor.metric_suffix, len(extractor.hash)) == ("clip-vit-b-32", "_clip", 64)
    with pytest.raises(ValueError, match="clip-vit-b-32 extractor has no classes: leave `is` out of the metrics"):
        extractor.class_logits(extractor(IMAGES))


def test_dinov2_is_its_authors(folder):
    """Numbers of facebookresearch/dinov2 at b8931f7, vit of this state dict with the options of its hub, in float32."""
    model = DINOv2(torch.load(folder / "dino.pth")).eval()
    for side, expected in DINO:
        images = torch.linspace(-2, 2, 2 * 3 * side * side).reshape(2, 3, side, side).sin()
        with torch.no_grad():
            found = model(images)
        assert found[:, [0, 100, 383]].flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_dinov2_without_torch_hub(folder, monkeypatch):
    monkeypatch.setattr("torch.hub.load", None)
    extractor = TorchFidelity("dinov2-vit-s-14", folder / "dino.pth")
    rows = extractor(IMAGES)
    assert rows.shape == (3, extractor.dim) == (3, 384)
    assert (extractor.metric_suffix, rows.dtype) == ("_dinov2", torch.float32)
    seen = []
    extractor._network.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(IMAGES)
    assert seen[0].shape == (3, 3, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, which DINOv2 was trained with
    std = torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][:, :, 0, 0], (IMAGES[:, :, 0, 0] / 255 - mean) / std, rtol=1e-4, atol=1e-4)


def test_vgg16(tmp_path, monkeypatch):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Linear(3, 5)
            self.classifier = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(7)])

        def forward(self, x):
            return self.classifier(self.features(x.mean((2, 3))))

    monkeypatch.setattr("torchvision.models.vgg16", Small)  # of 138 million parameters
    torch.save(Small().state_dict(), tmp_path / "vgg16.pth")
    extractor = TorchFidelity("vgg16", tmp_path / "vgg16.pth")
    assert extractor(IMAGES).shape == (3, extractor.dim) == (3, 5)
    assert extractor(IMAGES).min() >= 0
    assert extractor.metric_suffix == "_vgg16"


def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"evaluation.extractor.name=clip is none of torch-fidelity's: clip-rn101, .*vgg16"
    ):
        TorchFidelity("clip")
    with pytest.raises(ValueError, match="evaluation.extractor.precision must be 32 or bf16, got '16'"):
        TorchFidelity("vgg16", precision="16")
    message = r"no dinov2-vit-b-14 weights at .*dinov2_vitb14_pretrain.pth; add download=true to fetch https://dl.fb\S+pth, or"
    with pytest.raises(FileNotFoundError, match=message):
        TorchFidelity("dinov2-vit-b-14")
    with pytest.raises(
        FileNotFoundError, match=r"no clip-vit-b-32 weights at .*/clip-vit-b-32-40d36571\w+.pt; add download"
    ):
        TorchFidelity("clip-vit-b-32")
    with pytest.raises(
        ValueError, match=r"dino.pth holds weights of another network; fetch https://\S+vitb14_pretrain.pth"
    ):
        TorchFidelity("dinov2-vit-b-14", folder / "dino.pth")
    for name, file in (("clip-vit-b-32", "dino.pth"), ("dinov2-vit-s-14", "clip.pt")):
        with pytest.raises(OSError, match=rf"{file} is damaged or no file of weights; delete it and fetch it again"):
            TorchFidelity(name, folder / file)
    copy = tmp_path / f"clip-{'0' * 64}.pt"
    copy.write_bytes((folder / "clip.pt").read_bytes())
    with pytest.raises(OSError, match=r"its name says 00000000: damaged or another file; delete it and fetch it again"):
        check_hub_name(copy)


def test_fast_extractors_are_others_and_know_the_exact_one(folder, monkeypatch):
    sizes = []

    def compiled(network):
        return lambda images: sizes.append(len(images)) or network(images)

    monkeypatch.setattr("torch.compile", compiled)
    monkeypatch.setattr("stillhouse.metrics.fidelity._CHUNK", 2)
    exact = TorchFidelity("clip-vit-b-32", folder / "clip.pt")
    both = TorchFidelity("clip-vit-b-32", folder / "clip.pt", precision="bf16", compile=True)
    fast = TorchFidelity("clip-vit-b-32", folder / "clip.pt", precision="bf16")
    assert exact.exact is None
    assert (both.name, fast.name) == ("clip-vit-b-32-bf16-compiled", "clip-vit-b-32-bf16")
    assert len({exact.hash, both.hash, fast.hash}) == 3
    assert (fast.exact.name, fast.exact.hash) == (exact.name, exact.hash)
    plain = exact(IMAGES)
    assert torch.equal(fast.exact(IMAGES), plain)
    rows = both(IMAGES)
    assert sizes == [2, 2], "the last batch is filled up"
    assert rows.dtype == torch.float32
    assert torch.equal(rows, fast(IMAGES))
    assert 0 < (rows - plain).abs().max() < 0.05 * plain.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact(IMAGES), plain)


def test_a_fast_inception_keeps_its_names(tmp_path, monkeypatch):
    class Tiny(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)

    monkeypatch.setattr("torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY", {"inception-v3-compat": Tiny})
    torch.save({}, tmp_path / "w.pth")
    fast = Inception(tmp_path / "w.pth", precision="bf16")
    assert (fast.name, fast.exact.name) == ("inception-bf16", "inception")
    assert fast.metric_suffix == fast.exact.metric_suffix == ""


class Rounded(Stub):
    """A fast stub."""

    name, hash = "stub-fast", "6" * 64

    def __init__(self):
        super().__init__()
        self.exact, self.shift = Stub(), None

    def __call__(self, images):
        return super().__call__(images).bfloat16().float()


def test_the_shift_is_shown_once_and_recorded_and_values_never_share_a_table(capsys, tmp_path):
    options = {"name": "run", "subject": "student", "nfe": 1, "shape": SHAPE, "num_classes": 3, "batch_size": 16}
    options |= {"device": "cpu", "num_samples": 30, "blocks": 2, "reference": stub_reference(), "progress": False}
    (exact,) = measure_sampler(sampler, extractor=Stub(), **options)
    assert exact.shift is None
    assert capsys.readouterr().out == ""
    fast = Rounded()
    record, kid = measure_sampler(sampler, extractor=fast, metrics=["fid", "kid"], **options)
    assert record.shift == pytest.approx(record.values[0] - exact.values[0], rel=1e-6)
    assert record.shift != 0
    assert kid.shift is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"stub-fast: fid_stub of 30 samples of run is {exact.values[0]:.5g} in float32, ")
    assert printed.endswith(f"a shift of {record.shift:+.2g}\n")
    assert printed.count("\n") == 1
    measure_sampler(sampler, extractor=fast, **options)
    assert capsys.readouterr().out == ""
    assert records_text([exact, record]).count("fingerprint") == 2
    ours, theirs = (reference_statistics(Packed(), e, tmp_path) for e in (Rounded(), Stub()))
    assert torch.equal(ours.mu, theirs.mu), "the reference of a fast extractor is the exact one's"
    assert len(list(tmp_path.iterdir())) == 1


def test_hash_in_a_name(tmp_path):
    for content in (b"a", b"b"):
        path = tmp_path / f"x-{sha256(content).hexdigest()[:8]}.pth"
        path.write_bytes(content)
        check_hub_name(path)
    (tmp_path / "weights-2015-12-05.pth").write_bytes(b"c")
    check_hub_name(tmp_path / "weights-2015-12-05.pth")  # a date is no hash
