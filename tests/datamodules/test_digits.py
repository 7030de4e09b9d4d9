import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from datamodules.components.image_datamodule import flips
from datamodules.digits import Digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    Digits(root=str(root), batch_size=8).prepare_data()
    return str(root)


def device_batches(module, count):
    iterator = iter(module.train_dataloader())
    return [module.on_after_batch_transfer(next(iterator), 0) for _ in range(count)]


def test_content_is_scikit_learns(root):
    source = load_digits()
    packed = Digits(root=root, batch_size=8).reference()
    assert packed.images.shape == (1797, 1, 8, 8)
    assert np.abs(packed.images[:, 0] / 255 * 16 - source.images).max() <= 0.5 * 16 / 255 + 1e-9
    assert (packed.images.min(), packed.images.max()) == (0, 255)
    assert np.array_equal(packed.labels, source.target)
    assert packed.meta["classes"] == 10
    packed.verify()


def test_batches_are_in_data_range_with_their_labels(root):
    module = Digits(root=root, batch_size=1797, seed=1)
    packed = module.reference()
    batch = device_batches(module, 1)[0]
    assert set(batch) == {"image", "label", "position"}
    assert batch["image"].dtype == torch.float32
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    images = ((batch["image"] + 1) * 127.5).round().numpy().astype(np.uint8)
    pairs = {(image.tobytes(), label) for image, label in zip(images, batch["label"].tolist(), strict=True)}
    assert pairs == {(image.tobytes(), label) for image, label in zip(packed.images, packed.labels, strict=True)}


def test_unconditional_drops_labels_but_not_those_of_the_reference(root):
    module = Digits(root=root, batch_size=8, conditional=False)
    assert module.num_classes == 0
    assert set(device_batches(module, 1)[0]) == {"image", "position"}
    assert module.reference().labels is not None


def test_flips_mirror_half_of_the_images_by_position_alone(root):
    plain = device_batches(Digits(root=root, batch_size=900, seed=2), 4)
    flipped = device_batches(Digits(root=root, batch_size=900, seed=2, flip=True), 4)
    again = device_batches(Digits(root=root, batch_size=900, seed=2, flip=True), 4)
    mirrored = []
    for a, b, c in zip(plain, flipped, again, strict=True):
        assert torch.equal(b["image"], c["image"])
        same = (a["image"] == b["image"]).flatten(1).all(1)
        mirror = (a["image"].flip(-1) == b["image"]).flatten(1).all(1)
        assert (same | mirror).all()
        mirrored.append(~same)
    share = torch.cat(mirrored).float().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 3600**0.5  # four standard deviations
    assert not torch.equal(mirrored[0], mirrored[1])


def test_flips_do_not_depend_on_the_batch_or_the_global_generator():
    positions = torch.arange(1 << 33, (1 << 33) + 1000)
    whole = flips(7, positions)
    torch.manual_seed(123)
    assert torch.equal(whole, torch.cat([flips(7, part) for part in positions.split(77)]))
    assert (whole != flips(8, positions)).any()
    assert (whole != flips(7, positions - (1 << 32))).any()


def test_workers_give_the_same_batches(root):
    here, there = (iter(Digits(root=root, batch_size=64, num_workers=n).train_dataloader()) for n in (0, 1))
    for _ in range(3):
        a, b = next(here), next(there)
        assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "position"))


def test_loading_leaves_the_global_generator_alone(root):
    module = Digits(root=root, batch_size=64, flip=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    device_batches(module, 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 16}, r"resolution=16, but .*digits was packed with 8; correct the option"),
        ({"channels": 3}, "channels=3, but"),
        ({"num_classes": 11}, "num_classes=11, but"),
        ({"name": "../../x"}, "data.name='../../x' must name one folder below "),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_misuse(root, options, message):
    with pytest.raises(ValueError, match=message):
        Digits(root=root, **{"batch_size": 8, **options}).setup("fit")
