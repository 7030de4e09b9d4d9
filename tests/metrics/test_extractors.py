import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from datamodules import pack
from datamodules.fashion_mnist import read_idx, resized
from stillhouse.checkpoints.weights import find_weights
from stillhouse.metrics.digits_classifier import WEIGHTS, classifier_accuracy, load_digit_images, split_digits
from stillhouse.metrics.distances import frechet_distance
from stillhouse.metrics.evaluation import printed_metric
from stillhouse.metrics.extractors import Digits, Fashion, Pixels, Points
from stillhouse.metrics.fashion_classifier import RESOLUTIONS, accuracy, main, train_classifier, weights_file
from stillhouse.metrics.images import from_uint8, to_uint8
from stillhouse.metrics.statistics import RunningGaussian

IMAGES, LABELS = load_digit_images()
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def extractor():
    return Digits()


@pytest.fixture(scope="module")
def card():
    return json.loads(find_weights(WEIGHTS).with_suffix(".json").read_text())


def test_uint8_rule_is_edms_and_inverts_normalisation():
    x = torch.tensor([-5.0, -1, -0.9999, 0, 0.999, 0.9999, 1, 5])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255, 255]
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


def test_classifier_is_as_accurate_as_its_card_says(extractor, card):
    train, held_out = split_digits()
    assert len(train) + len(held_out) == 1797
    assert hashlib.sha256(held_out.numpy().tobytes()).hexdigest() == card["held_out_sha256"], "another split"
    assert not set(train.tolist()) & set(held_out.tolist())
    logits = extractor.class_logits(extractor(IMAGES[held_out]))
    share_right = (logits.argmax(dim=1) == LABELS[held_out]).float().mean().item()
    assert share_right == pytest.approx(card["held_out_accuracy"])
    assert classifier_accuracy(extractor._classifier, IMAGES[held_out], LABELS[held_out]) == pytest.approx(share_right)
    assert share_right >= 0.985


def test_classifier_file_is_the_one_on_the_card_and_small(card):
    content = Path(find_weights(WEIGHTS)).read_bytes()
    assert hashlib.sha256(content).hexdigest() == card["sha256"]
    assert len(content) < 150_000


def test_features_are_float32_without_gradient_and_the_same_under_autocast(extractor):
    plain = extractor(IMAGES[:50])
    assert plain.shape == (50, extractor.dim)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = extractor(IMAGES[:50])
        logits = extractor.class_logits(within)
    assert torch.equal(within, plain)
    assert torch.equal(logits, extractor.class_logits(plain))
    assert logits.dtype == torch.float32
    assert not plain.requires_grad


def test_extractor_refuses_other_images(extractor):
    with pytest.raises(ValueError, match=r"uint8 images \(N, 1, 8, 8\), got torch.uint8 \(2, 3, 32, 32\)"):
        extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        extractor(torch.zeros(2, 1, 8, 8))


def test_missing_classifier_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no classifier of digits at .*gone.*python -m stillhouse\.metrics\.digits_classifier"
    ):
        Digits(tmp_path / "gone.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=r"no classifier of fashion at .*gone.*fashion_classifier --data data/fashion_mnist32 --output",
    ):
        Fashion(32, tmp_path / "gone.safetensors")


@pytest.mark.parametrize("side", RESOLUTIONS)
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_classifier_of_clothes_is_as_accurate_as_its_card_says(side, count):
    images, labels = (read_idx(DEBIAN / f"t10k-{kind}-ubyte.gz")[0][:count] for kind in ("images-idx3", "labels-idx1"))
    card = json.loads(find_weights(weights_file(side)).with_suffix(".json").read_text())
    extractor = Fashion(side)
    features = extractor(torch.from_numpy(resized(images, side)[:, None]))
    share_right = (extractor.class_logits(features).argmax(1).numpy() == labels).mean()
    assert share_right == pytest.approx(card["test_accuracy"], abs=1e-3 if count == card["test_images"] else 0.02)
    assert card["test_accuracy"] >= 0.91
    assert features.std(dim=0).min() > 1e-2


@pytest.mark.parametrize("side", RESOLUTIONS)
def test_the_file_of_the_classifier_of_clothes_is_the_one_on_its_card_and_small(side):
    content = Path(find_weights(weights_file(side))).read_bytes()
    card = json.loads(find_weights(weights_file(side)).with_suffix(".json").read_text())
    assert hashlib.sha256(content).hexdigest() == card["sha256"]
    assert len(content) < 1_000_000


def test_the_extractor_of_clothes_refuses_other_images_and_sizes():
    with pytest.raises(
        ValueError, match=r"the fashion extractor reads uint8 images \(N, 1, 16, 16\), got .* \(2, 1, 8, 8\)"
    ):
        Fashion(16)(IMAGES[:2])
    with pytest.raises(
        ValueError, match=r"data\.resolution=28: .* 16 and 32 pixels a side alone.*evaluation=pixels needs"
    ):
        Fashion(28)
    assert printed_metric("fid", Fashion(16)) == "fid_fashion"


@pytest.mark.slow
def test_a_classifier_of_clothes_learns_the_same_twice():
    labels = np.arange(40) % 2 * 9  # boots, which are never mirrored, beside shirts
    images = np.zeros((40, 1, 16, 16), np.uint8)
    images[labels == 9, :, :, :5], images[labels == 0, :, 4:12] = 200, 255
    one, two = (train_classifier(images, labels, seed=3, epochs=6, batch_size=10) for _ in range(2))
    assert accuracy(one, images, labels) == 1
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("side", "classes", "test", "message"),
    [
        (
            28,
            10,
            True,
            "holds images of channels=1, resolution=28, num_classes=10; pack grey ones of 16 or 32 pixels",
        ),
        (16, 0, True, "holds images of channels=1, resolution=16, num_classes=0; pack grey ones of 16 or 32 pixels"),
        (16, 10, False, "no packed images in {folder}/test; a run of data=fashion_mnist data.resolution=16 packs them"),
        (16, 10, True, "{folder} holds 20 images, and 5,000 are held out: pack all 60,000"),
    ],
)
def test_a_classifier_of_clothes_refuses_other_data_before_it_is_trained(
    tmp_path, monkeypatch, capsys, side, classes, test, message
):
    folder = tmp_path / "packed"
    for place in (folder, folder / "test") if test else (folder,):
        meta = {"name": "f", "classes": classes, "source": "", "preprocessing": ""}
        labels = np.arange(20) % classes if classes else None
        pack(place, np.zeros((20, 1, side, side), np.uint8), 20, (1, side, side), labels=labels, meta=meta)
    command = ["fashion_classifier", "--data", str(folder), "--output", str(tmp_path / "c.safetensors")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message.format(folder=folder) in capsys.readouterr().err.splitlines()[-1]


def test_every_feature_is_alive_and_the_covariance_has_full_rank(extractor):
    features = extractor(IMAGES)
    assert features.std(dim=0).min() > 1e-2
    eigenvalues = torch.linalg.eigvalsh(features.double().T.cov())
    assert eigenvalues[0] > 1e-3
    assert eigenvalues.sum() ** 2 / eigenvalues.square().sum() > 8  # effective rank


def test_distance_orders_damage_by_its_size(extractor):
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(IMAGES), generator=generator)
    ours, theirs = IMAGES[order[::2]], IMAGES[order[1::2]]
    labels = LABELS[order[1::2]]
    reference = RunningGaussian(extractor.dim).update(extractor(ours))

    def distance(images):
        other = RunningGaussian(extractor.dim).update(extractor(images))
        return frechet_distance(other.mean, other.cov, reference.mean, reference.cov).item()

    def noisy(std):
        return (theirs + std * torch.randn(theirs.shape, generator=generator)).clamp(0, 255).to(torch.uint8)

    def blurred(share):
        blur = functional.avg_pool2d(functional.pad(theirs.float(), (1, 1, 1, 1)), 3, 1)
        return (share * blur + (1 - share) * theirs).to(torch.uint8)

    floor = distance(theirs)
    noise = [distance(noisy(std)) for std in (24, 48, 96)]
    blur = [distance(blurred(share)) for share in (0.25, 0.5, 1)]
    dropped = [distance(theirs[labels >= missing]) for missing in (1, 3, 5)]
    for damage in (noise, blur, dropped):
        assert floor * 1.2 < damage[0] < damage[1] < damage[2], (floor, damage)
        assert damage[2] > 10 * floor, (floor, damage)


def test_points_are_their_coordinates():
    points = Points().to("cpu")
    pixels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([pixels, pixels.flip(0)], 1)[:, :, None, None]
    features = points(images)
    assert features.shape == (256, points.dim)
    assert features.dtype == torch.float32
    assert (features.min(), features.max()) == (-1, 1)
    assert torch.equal(to_uint8(features), images.flatten(1))
    assert points.metric_suffix == "_points"
    assert len(points.hash) == 64


def test_points_refuse_images_and_classes():
    with pytest.raises(ValueError, match=r"uint8 images \(N, 2, 1, 1\), got torch.uint8 \(2, 1, 8, 8\)"):
        Points()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        Points()(torch.zeros(2, 2, 1, 1))
    with pytest.raises(ValueError, match="points of the plane have no classes: leave `is` out of the metrics"):
        Points().class_logits(torch.zeros(3, 2))


def test_pixels_are_means_of_fields_and_sizes_of_steps():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[:, 0], images[0, :, :, 8:], images[1, 2, 4:6, 2:4] = 255, 255, 51
    pixels = Pixels().to("cpu")
    features = pixels(images)
    assert features.shape == (2, pixels.dim)
    assert features.dtype == torch.float32
    colours, right, down = features[:, :192].reshape(2, 3, 8, 8), features[:, 192:208], features[:, 208:]
    assert torch.equal(colours[0, 0], torch.ones(8, 8))
    assert torch.equal(colours[0, 1, :, :4], -torch.ones(8, 4))
    assert torch.equal(colours[0, 1, :, 4:], torch.ones(8, 4))
    assert colours[1, 2, 2, 1] == pytest.approx(2 * 51 / 255 - 1)  # a field of two pixels a side
    # The only step of the first image, from red to white by 2/3 of 2 in brightness, is in the 5 columns of two fields.
    fields = right[0].reshape(4, 4)
    assert torch.equal(fields[:, [0, 3]], torch.zeros(4, 2))
    torch.testing.assert_close(fields[:, 1:3], torch.full((4, 2), 4 / 3 / 5))
    assert torch.equal(down[0], torch.zeros(16))
    assert down[1].max() > 0
    grey = torch.randint(256, (3, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pixels(grey), pixels(grey.expand(-1, 3, -1, -1)))


def test_the_distance_of_pixels_is_no_fid_and_grows_with_blur_and_other_colours():
    images = from_uint8(IMAGES)
    pixels = Pixels()

    def distance(other):
        one, two = (RunningGaussian(pixels.dim).update(pixels(to_uint8(part))) for part in (images[::2], other[1::2]))
        return frechet_distance(one.mean, one.cov, two.mean, two.cov).item()

    floor, blurred, darker = (distance(x) for x in (images, functional.avg_pool2d(images, 3, 1, 1), images * 0.8 - 0.2))
    assert min(blurred, darker) > 5 * floor, (floor, blurred, darker)
    assert printed_metric("fid", pixels) == "fd_pixels"
    assert printed_metric("kid", pixels) == "kid_pixels"
    assert len(pixels.hash) == 64


def test_pixels_refuse_other_images_and_classes():
    for shape in ((2, 2, 8, 8), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"uint8 images \(N, 1 or 3, H, W\) of 2 pixels a side or more"):
            Pixels()(torch.zeros(*shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pixels have no classes"):
        Pixels().class_logits(torch.zeros(3, 224))
