"""The example of docs/extending/data_set.md: one Python file and one YAML make a data set."""

import gzip
import shutil
import struct

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from benchmarks.measuring import ROOT
from launch.run.names import register_resolvers

EXAMPLE = ROOT / "docs/examples/add_a_data_set"
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 10


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A function that builds the data set as `data=fashion_mnist` does."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "data/fashion-mnist/train-images-idx3-ubyte.gz", IMAGES)
    write_idx(tmp_path / "data/fashion-mnist/train-labels-idx1-ubyte.gz", LABELS)
    register_resolvers()
    found = [f"hydra.searchpath=[file://{EXAMPLE}/conf]", "data=fashion_mnist", "teacher=none", "batch_size=8"]

    def build(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return instantiate(compose("config", [*found, "method=pretrain", *overrides]).data)

    return build


def test_it_packs_serves_and_notices_changes(data, tmp_path):
    module = data("data.flip=false")
    packed = module.reference()
    assert np.array_equal(packed.images[:, 0], IMAGES)
    assert packed.labels.tolist() == LABELS.tolist()
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert batch["image"].shape == (8, 1, 28, 28)
    assert batch["image"].abs().max() <= 1
    assert data("data.conditional=false").num_classes == 0
    data().check_source()
    write_idx(tmp_path / "data/fashion-mnist/train-images-idx3-ubyte.gz", 255 - IMAGES)
    with pytest.raises(ValueError, match="fashion-mnist has changed since .*fashion_mnist was packed .*other images"):
        data().check_source()


def test_misuse(data, tmp_path):
    images = tmp_path / "data/fashion-mnist/train-images-idx3-ubyte.gz"
    with pytest.raises(InstantiationException, match="data.channels=3: fashion_mnist is packed with 1 channels"):
        data("data.channels=3")
    for content in (images.read_bytes()[:-100], gzip.compress(b""), gzip.compress(b"\0\0\x0d\x01" + bytes(4))):
        images.write_bytes(content)
        with pytest.raises(OSError, match=r"train-images-idx3-ubyte.gz is damaged \(.*\); get it again"):
            data().prepare_data()
    images.unlink()
    with pytest.raises(FileNotFoundError, match="is missing; get it again, or correct data.path"):
        data().prepare_data()
    shutil.rmtree(images.parent)
    with pytest.raises(
        FileNotFoundError, match=r"no fashion_mnist images: .* exists; put train-images-idx3-ubyte.gz and"
    ):
        data().check_source()
