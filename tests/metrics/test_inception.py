"""With random weights in the real ones' format; the real ones are not here."""

import sys

import numpy as np
import pytest
import torch
from inception_file import write_inception

from stillhouse.checkpoints.weights import hash_file
from stillhouse.metrics.extractors import Inception
from stillhouse.metrics.reference import reference_statistics

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.fixture(scope="module")
def extractor(weights):
    return Inception(weights)


@pytest.fixture(scope="module")
def rows(extractor):
    return extractor(IMAGES)


def test_features_and_logits_are_torch_fidelitys(weights, extractor, rows):
    from torch_fidelity import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    features, logits = theirs(IMAGES)
    assert rows.shape == (3, extractor.dim) == (3, 2048)
    assert rows.dtype == torch.float32
    assert rows.std(dim=0).mean() > 1e-3
    torch.testing.assert_close(rows, features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extractor.class_logits(rows), logits, rtol=1e-5, atol=1e-5)
    assert logits.shape == (3, 1008)


def test_the_same_under_autocast_and_in_parts(extractor, rows, monkeypatch):
    monkeypatch.setattr("stillhouse.metrics.fidelity._CHUNK", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = extractor(IMAGES)
        logits = extractor.class_logits(within)
    torch.testing.assert_close(within, rows, rtol=1e-5, atol=1e-6)
    assert within.dtype == logits.dtype == torch.float32
    assert not within.requires_grad


def test_metrics_have_their_own_names_and_the_weights_a_hash(extractor, weights, tmp_path):
    assert (extractor.name, extractor.metric_suffix) == ("inception", "")
    state = torch.load(weights)
    state["fc.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    assert len(extractor.hash) == 64
    assert Inception(str(tmp_path / "other.pth")).hash != extractor.hash
    assert Inception(weights).hash == extractor.hash


def test_other_images_are_refused(extractor):
    for images in (IMAGES[:, :2], IMAGES.float(), IMAGES[0]):
        with pytest.raises(ValueError, match=r"reads uint8 images \(N, 1 or 3, H, W\), got .*evaluation=") as caught:
            extractor(images)
        assert "\n" not in str(caught.value)


def test_weights_are_found_where_torch_fidelity_keeps_them_and_their_name_says_their_hash(
    weights, extractor, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    usual = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    message = rf"no inception-v3-compat weights at {usual}; add download=true to fetch \S+/{usual.name}, or put the file there"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        Inception()
    assert "\n" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=r"no inception-v3-compat weights at .*gone.pth; add download=true to fetch http://x,"
    ):
        Inception(tmp_path / "gone.pth", url="http://x")
    usual.parent.mkdir(parents=True)
    usual.symlink_to(weights)
    found = hash_file(weights)[:8]
    message = (
        rf"{usual.name} has SHA-256 {found}..., its name says 6726825d: damaged or another file; delete it and fetch"
    )
    for path in (None, f"weights/{usual.name}"):
        with pytest.raises(OSError, match=message) as caught:
            Inception(path)
        assert "\n" not in str(caught.value)
    named = usual.with_name(f"weights-{found}.pth")
    usual.rename(named)
    assert Inception(f"weights/{named.name}").hash == extractor.hash


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (400, 350)])
def test_pixels_that_the_network_sees_are_tensorflows_resized_without_antialias(extractor, size):
    """As EDM's detector makes them: pixel i of 299 is read at i * size / 299 (no half-pixel shift, also when it shrinks)."""
    seen = []

    def stop(module, inputs):
        seen.append(inputs[0])
        raise StopIteration

    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=GENERATOR)
    handle = extractor._network.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    with pytest.raises(StopIteration):
        extractor(images)
    handle.remove()

    def weights(length):
        places = np.arange(299) * length / 299
        low = places.astype(int)
        matrix = np.zeros((299, length))
        np.add.at(matrix, (np.arange(299), low), 1 - (places - low))
        np.add.at(matrix, (np.arange(299), np.minimum(low + 1, length - 1)), places - low)
        return matrix

    expected = weights(size[0]) @ images[0].double().numpy() @ weights(size[1]).T
    assert np.abs(seen[0][0].numpy() * 128 + 128 - expected).max() < 1e-2
    shifted = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    assert (shifted - (seen[0] * 128 + 128)).abs().mean() > 1, "the usual resizing is another one"


class Bad:
    def __reduce__(self):
        return (pytest.fail, ("what a pickle says was run",))


def test_damaged_foreign_and_malicious_files_are_refused(weights, tmp_path):
    path = tmp_path / "a.pth"
    for content in (weights.read_bytes()[:-1000], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"a.pth is damaged or no file of weights; delete it and fetch it again"):
            Inception(path)
    torch.save(Bad(), path)
    with pytest.raises(OSError, match=r"a.pth is damaged or no file of weights"):
        Inception(path)
    for state in ({"fc.weight": torch.zeros(3)}, torch.zeros(3)):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"a.pth holds weights of another network; fetch .*pth$") as caught:
            Inception(path)
        assert "\n" not in str(caught.value)


def test_without_torch_fidelity_the_way_out_is_named(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"needs torch-fidelity \(.*\): pip install torch-fidelity"):
        Inception(weights)


def test_statistics_of_real_images_are_cached_under_its_name(extractor, tmp_path):
    class Packed:
        hash = "a" * 64

        def __len__(self):
            return 3

        def fetch(self, indices):
            return IMAGES[indices], None

    reference = reference_statistics(Packed(), extractor, tmp_path)
    assert reference.mu.shape == (2048,)
    assert [path.name for path in tmp_path.iterdir()] == [f"inception-{extractor.hash[:16]}-{'a' * 16}.npz"]
