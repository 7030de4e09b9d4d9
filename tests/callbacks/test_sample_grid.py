"""The same weights give the same picture, in the folder and in the loggers."""

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from tiny_module import TinyMethod, trainer

from callbacks.ema import EMA
from callbacks.sample_grid import SampleGrid
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise


def fit(folder, steps, *callbacks, module=None, **options):
    module = module or TinyMethod(batch_size=500)
    t = trainer(folder, steps, callbacks, **options)
    t.fit(module)
    return module, t


def test_files_by_kimg_and_at_the_end(tmp_path):
    for run in "ab":
        fit(tmp_path / run, 7, EMA(), SampleGrid(1, rows=2, columns=3))
        assert sorted(p.name for p in (tmp_path / run / "samples").iterdir()) == [
            "000001.png",
            "000002.png",
            "000003.png",
        ]
    for name in ("000001.png", "000003.png"):
        one, two = ((tmp_path / run / "samples" / name).read_bytes() for run in "ab")
        assert one == two
    assert (tmp_path / "a/samples/000001.png").read_bytes() != one
    fit(tmp_path / "c", 3, EMA(), SampleGrid(0.5, rows=2, columns=3))
    names = ["000000.500.png", "000001.000.png", "000001.500.png"]
    assert sorted(p.name for p in (tmp_path / "c/samples").iterdir()) == names


def test_shows_the_average_by_seed_and_label(tmp_path):
    class Labelled(TinyMethod):
        def sample(self, noise, labels=None):
            self.asked = (noise, labels, self.student[0].weight.detach().clone())
            return torch.linspace(-1, 1, 16).view(1, 1, 4, 4) * (labels / 9).view(-1, 1, 1, 1)

    module = Labelled(batch_size=500)
    module.data.num_classes = 10
    _, t = fit(tmp_path, 2, EMA(), SampleGrid(1, rows=2, columns=3), module=module)
    noise, labels, weight = module.asked
    assert torch.equal(noise, sample_noise(torch.arange(6), (1, 4, 4)))
    assert torch.equal(labels, sample_labels(torch.arange(6), 10))
    assert torch.equal(weight, t.callbacks[0].state_dict()["averages"]["ema_0.999"]["0.weight"])
    assert not torch.equal(weight, module.student[0].weight)
    # 4x4 images are shown at 32x32: the last pixel of an image is as bright as its label
    picture = np.asarray(Image.open(tmp_path / "samples/000001.png").convert("L"))
    assert picture.shape[1] > 3 * 32
    for value in set(labels.tolist()):
        assert (picture == min(int(value / 9 * 127.5 + 128), 255)).sum() >= 64


def test_loggers_get_the_picture(tmp_path):
    class Wandb(WandbLogger):
        def __init__(self):
            self.shown = []

        def log_image(self, key, images, step=None, **options):
            self.shown.append((key, images[0].shape, step))

        name = version = save_dir = ""
        experiment = property(lambda self: None)
        log_metrics = log_hyperparams = log_graph = save = finalize = lambda self, *args, **kwargs: None

    wandb, board = Wandb(), TensorBoardLogger(tmp_path / "tensorboard", name="", version="")
    shown = []
    board.experiment.add_image = lambda key, image, step, dataformats: shown.append(
        (key, image.shape, step, dataformats)
    )
    fit(tmp_path, 5, EMA(), SampleGrid(1, rows=2, columns=3), logger=[wandb, board])
    assert wandb.shown == [("samples/student", (64, 96, 3), step) for step in (1, 3, 4)]
    assert shown == [("samples", (64, 96, 3), step, "HWC") for step in (1, 3, 4)]


def test_training_is_left_alone(tmp_path):
    module, t = fit(tmp_path, 2, EMA(), SampleGrid(1))
    module.train()
    state = torch.get_rng_state()
    raw = module.student[0].weight.detach().clone()
    t.callbacks[1]._draw(t, module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in module.modules())
    assert torch.equal(module.student[0].weight, raw)


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="SampleGrid: every_kimg must be positive, got -1"):
        SampleGrid(-1)
    with pytest.raises(ValueError, match="SampleGrid: rows and columns must be at least 1, got 0 and 2"):
        SampleGrid(1, rows=0, columns=2)
    with pytest.raises(ValueError, match="SampleGrid must come after EMA in callbacks"):
        fit(tmp_path, 1, SampleGrid(1), EMA())
    with pytest.raises(ValueError, match="callbacks.grid of 1000000000 rows and 10 columns .* of memory"):
        fit(tmp_path, 1, EMA(), SampleGrid(1, rows=10**9))
