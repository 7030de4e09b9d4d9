"""The example of docs/extending/data_set.md: one Python file and one YAML make a data set."""

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks.measuring import ROOT
from launch.run.names import register_resolvers

EXAMPLE = ROOT / "docs/examples/add_a_data_set"
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8)[:, None] % 8


def write(path, images=IMAGES):
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, train_images=images, train_labels=LABELS, val_images=images[:3], val_labels=LABELS[:3])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A function that builds the data set as `data=bloodmnist` does."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/bloodmnist.npz")
    register_resolvers()
    found = [f"hydra.searchpath=[file://{EXAMPLE}/conf]", "data=bloodmnist", "teacher=none", "batch_size=8"]

    def build(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return instantiate(compose("config", [*found, "method=pretrain", *overrides]).data)

    return build


def test_it_packs_serves_and_notices_changes(data, tmp_path):
    module = data("data.flip=false")
    packed = module.reference()
    assert np.array_equal(packed.images, IMAGES.transpose(0, 3, 1, 2))
    assert packed.labels.tolist() == LABELS[:, 0].tolist()
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert batch["image"].shape == (8, 3, 28, 28)
    assert batch["image"].abs().max() <= 1
    assert data("data.conditional=false").num_classes == 0
    data().check_source()
    write(tmp_path / "data/bloodmnist.npz", 255 - IMAGES)
    with pytest.raises(ValueError, match="bloodmnist.npz has changed since .*bloodmnist was packed .*other images"):
        data().check_source()


def test_misuse(data, tmp_path):
    file = tmp_path / "data/bloodmnist.npz"
    with pytest.raises(ValueError, match="holds no train_images of 64x64 in RGB: correct data.resolution"):
        data("data.resolution=64").prepare_data()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"bloodmnist.npz is damaged \(.*\); get it again"):
        data().prepare_data()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no bloodmnist images: .* exists; get the file from medmnist.com"):
        data().check_source()
