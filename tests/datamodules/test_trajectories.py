import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from gaussian_teacher import GaussianTeacher

from datamodules.digits import Digits
from datamodules.trajectories import TrajectoryDataModule, TrajectoryStore, decode
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, TRAIN_SEEDS, sample_labels, sample_noise

SHAPE = (2, 4, 4)


class Collector(pl.LightningModule):
    def __init__(self, folder=None):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.folder = folder
        self.train_batches, self.held_out_batches = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch["noise"].flatten()[:1].to(self.dtype)).sum())
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.held_out_batches.append(batch)

    def on_train_end(self):
        if self.folder:
            content = {"train": self.train_batches, "held_out": self.held_out_batches}
            torch.save(content, self.folder / f"rank{self.global_rank}.pt")


def data_of(root, teacher=None, **changes):
    options = {"pairs": 40, "held_out": 12, "batch_size": 8, "seed": 3, "shard_size": 8, "sampling_batch": 4, **changes}
    return TrajectoryDataModule(GaussianTeacher() if teacher is None else teacher, root=str(root), **options)


def fit(module, data, steps=10, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    check = {"num_sanity_val_steps": 0, "val_check_interval": steps, "check_val_every_n_epoch": None}
    pl.Trainer(max_steps=steps, accelerator="cpu", **quiet, **check, **options).fit(module, datamodule=data)
    return module


def row(batch, i):
    return tuple(batch[key][i].numpy().tobytes() for key in ("noise", "label", "states"))


def rows(batches):
    """What was sampled, without the place where a batch has it."""
    kept = [{key: value for key, value in batch.items() if key != "position"} for batch in batches]
    return [row(batch, i) for batch in kept for i in range(len(batch["noise"]))]


def truth(first_seed, count, steps):
    seeds = torch.arange(count) + first_seed
    noise, labels = sample_noise(seeds, SHAPE), sample_labels(seeds, 4)
    states = torch.stack([*GaussianTeacher().trajectory(noise, labels)], 1)[:, [step - 1 for step in steps]]
    return {"noise": noise, "label": labels, "states": states.float(), "seed": seeds}


def test_batches_are_the_teachers_own(tmp_path):
    module = fit(Collector(), data_of(tmp_path, keep=[2, 5], dtype="float32"))
    batch = module.train_batches[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "noise": (torch.float32, (8, *SHAPE)),
        "label": (torch.int64, (8,)),
        "states": (torch.float32, (8, 2, *SHAPE)),
        "seed": (torch.int64, (8,)),
        "position": (torch.int64, (8,)),
    }
    assert torch.equal(batch["noise"], sample_noise(batch["seed"], SHAPE))
    positions = torch.cat([batch["position"] for batch in module.train_batches])
    assert torch.equal(positions, torch.arange(len(positions)))  # they go on over epochs
    assert sorted(rows(module.train_batches[:5])) == sorted(rows([truth(TRAIN_SEEDS, 40, [2, 5])]))  # one epoch
    assert rows(module.train_batches[:5]) != rows(module.train_batches[5:])
    assert rows(module.held_out_batches) == rows([truth(HELD_OUT_SEEDS, 12, [2, 5])])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_precision_does_not_touch_the_stored_states(tmp_path, precision, dtype):
    data = data_of(tmp_path, dtype=dtype)
    module = fit(Collector(), data, steps=5, precision=precision)
    assert module.train_batches[0]["states"].dtype == torch.float32
    expected = decode(data.train_stores[0].states(np.arange(40)))
    found = torch.cat([batch["states"] for batch in module.train_batches])
    assert sorted(x.numpy().tobytes() for x in found) == sorted(x.numpy().tobytes() for x in expected)


def test_unconditional_batches_have_no_label(tmp_path):
    data = data_of(tmp_path, GaussianTeacher(num_classes=0))
    assert data.num_classes == 0
    assert set(fit(Collector(), data, steps=1).train_batches[0]) == {"noise", "states", "seed", "position"}


class Affine(GaussianTeacher):
    """Its end points are those of the other, times `scale`, plus `offset`."""

    def __init__(self, scale, offset):
        super().__init__("affine")
        self.scale, self.offset, self.hash = scale, offset, f"{scale} {offset}"

    def trajectory(self, *arguments, **options):
        *states, last = super().trajectory(*arguments, **options)
        yield from (*states, self.scale * last + self.offset)


def test_several_teachers_start_from_one_noise_and_label(tmp_path):
    first, second = GaussianTeacher(), GaussianTeacher("shifted")
    second.shift, second.hash = 0.1, "cd" * 32
    data = data_of(tmp_path, [first, second], keep=[2, 5], dtype="float32")
    batch = fit(Collector(), data).train_batches[0]
    for teacher, states in zip((first, second), batch["states"].split(2, dim=1), strict=True):
        made = torch.stack([*teacher.trajectory(batch["noise"], batch["label"])], 1)[:, [1, 4]]
        torch.testing.assert_close(states, made.float(), rtol=0, atol=1e-6)
    assert data.name == "shifted"


@pytest.mark.parametrize("scale", [0.5, 127.5])
def test_teachers_of_another_range_are_refused(tmp_path, scale):
    message = r"the values of gauss's images span 1\.\d\d, those of affine's \d+\.\d\d; .* in one range, \[-1, 1\]"
    with pytest.raises(ValueError, match=message):
        fit(Collector(), data_of(tmp_path, [GaussianTeacher(), Affine(scale, scale)], dtype="float32"))


def test_teachers_of_nearly_one_range_are_not(tmp_path):
    fit(Collector(), data_of(tmp_path, [GaussianTeacher(), Affine(0.8, 0.1)], dtype="float32"), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"resolution": 8},
            "gauss has resolution=4, other 8; teachers that start from one noise and label must agree in size and classes",
        ),
        ({"channels": 1}, "gauss has channels=2, other 1;"),
        ({"num_classes": 0}, "gauss has num_classes=4, other 0;"),
    ],
)
def test_teachers_of_another_size_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, [GaussianTeacher(), GaussianTeacher("other", **options)])


def test_pairs_whose_order_fits_into_no_memory_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^method.pairs=100000000000000 \(lower it\): .* would take some 1.6e\+06 GB of memory"
    ):
        data_of(tmp_path, pairs=10**14)


def test_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must name at least one teacher"):
        data_of(tmp_path, [])


def test_two_ranks_fill_and_serve_what_one_does(tmp_path):
    one = fit(Collector(), data_of(tmp_path / "one"))
    fit(Collector(tmp_path), data_of(tmp_path / "two"), devices=2, strategy="ddp_fork")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for key, whole in (("train", one.train_batches), ("held_out", one.held_out_batches)):
        assert len(ranks[0][key]) == len(ranks[1][key]) == len(whole)
        together = [rows([a]) + rows([b]) for a, b in zip(ranks[0][key], ranks[1][key], strict=True)]
        assert together == [rows([batch]) for batch in whole]
    files = [sorted((tmp_path / name).rglob("*.npy")) for name in ("one", "two")]
    assert [a.read_bytes() for a in files[0]] == [b.read_bytes() for b in files[1]]


def test_a_store_that_the_teacher_contradicts_stops_the_run(tmp_path):
    fit(Collector(), data_of(tmp_path), steps=1)
    teacher = GaussianTeacher()
    teacher.shift = 0.2
    with pytest.raises(OSError, match="entry 0 is not what teacher gauss gives now"):
        fit(Collector(), data_of(tmp_path, teacher), steps=1)


def test_held_out_pairs_must_divide(tmp_path):
    with pytest.raises(Exception, match="held_out=11 cannot be divided evenly over 2 devices"):
        fit(Collector(), data_of(tmp_path, held_out=11), devices=2, strategy="ddp_fork")


def test_attributes_and_reference(tmp_path):
    images = Digits(root=str(tmp_path), batch_size=8)
    data = data_of(tmp_path, images=images)
    shape = (data.name, data.resolution, data.channels, data.num_classes, data.batch_size, data.seed)
    assert shape == ("gauss", 4, 2, 4, 8, 3)
    data.prepare_data()
    assert (tmp_path / "digits").is_dir()
    assert data.reference() is images.reference()
    with pytest.raises(ValueError, match="trajectories of gauss have no real images; pass images="):
        data_of(tmp_path).reference()
    assert isinstance(data.train_stores[0], TrajectoryStore)
    assert data.train_stores[0].folder != data.held_out_stores[0].folder
