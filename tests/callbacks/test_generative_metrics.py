"""Metrics during training against a computation of their own, and without a trace in the training."""

import csv

import numpy as np
import pytest
import scipy.linalg
import torch
from process_tools import in_two_processes
from tiny_module import TWO, TinyMethod, identical, trainer

from callbacks.checkpoint import Checkpoints, read_checkpoint
from callbacks.ema import EMA
from callbacks.generative_metrics import GenerativeMetrics
from callbacks.loggers.csv_logger import CSVLogger
from stillhouse.analysis.curves import metric_with_count
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS, sample_noise
from stillhouse.metrics.statistics import RunningGaussian, save_statistics

AVERAGES = [{"decay": 0.5}, {"decay": 0.9}]


class Pixels:
    """An extractor whose features are eight pixels."""

    name, metric_suffix, dim, hash = "pixels", "_pixels", 8, "0" * 64

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return images.flatten(1)[:, :8].float() / 255

    def to(self, device):
        return self


class Real:
    """100 real images."""

    hash = "1" * 64
    images = torch.randint(256, (100, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return 100

    def fetch(self, indices):
        return self.images[torch.as_tensor(indices)], None


def method():
    module = TinyMethod(batch_size=100)
    module.data.reference = Real
    return module


def callback(every_kimg=0.4, **options):
    return GenerativeMetrics(every_kimg, 130, Pixels(), cache_folder=None, **options)


def fit(folder, steps, *callbacks, **options):
    module = method()
    t = trainer(folder, steps, [EMA(AVERAGES), *callbacks], logger=CSVLogger(folder, 100), **options)
    t.fit(module)
    return module, t


def logged(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: {int(row["step"]): float(row[key]) for row in rows if row[key]} for key in rows[0] if key.startswith("fid")
    }


def test_values_are_those_of_the_averages_of_that_step(tmp_path):
    module, t = fit(tmp_path, 7, callback(ema_names=["ema_0.5", "ema_0.9", "raw"]))
    values = logged(tmp_path)
    assert {key: list(column) for key, column in values.items()} == {
        f"fid_pixels_130/{name}": [4, 7] for name in ("ema_0.5", "ema_0.9", "raw")
    }
    assert len({column[7] for column in values.values()}) == 3
    real = Pixels()(Real.images).double().numpy()
    noise = sample_noise(MONITOR_SEEDS + torch.arange(130), module.shape)
    module.eval()
    for name, column in values.items():
        with t.callbacks[0].applied(module, name.split("/")[1]):
            x = module.sample(noise)
        fake = Pixels()((x * 127.5 + 128).clamp(0, 255).to(torch.uint8)).double().numpy()
        c1, c2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
        fid = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
        assert column[7] == pytest.approx(fid, rel=1e-5)
        assert float(t.callback_metrics[name]) == pytest.approx(column[7], rel=1e-6)


def test_several_numbers_of_evaluations(tmp_path):
    """The method's own number keeps its name; a number that the student is not trained for is refused."""

    class Twice(TinyMethod):
        nfe = property(lambda self: self.chosen_nfe or 1, lambda self, value: None)

        def sampling(self, nfe):
            if nfe > 2:
                raise ValueError(f"steps={nfe}: the student takes 1, 2, and no other number")

        def sample(self, noise, labels=None):
            return super().sample(super().sample(noise) if self.nfe == 2 else noise)

    def both(nfe):
        module = Twice(batch_size=100)
        module.data.reference = Real
        measuring = callback(nfe=nfe)
        t = trainer(tmp_path, 4, [measuring])
        t.fit(module)
        assert module.chosen_nfe is None
        return t, module, measuring

    t, module, measuring = both([2, 1])
    values = measuring.evaluate(t, module)
    assert list(values) == ["fid_pixels_130_2nfe/raw", "fid_pixels_130/raw"]
    one, *_ = both(None)
    assert float(one.callback_metrics["fid_pixels_130/raw"]) == pytest.approx(values["fid_pixels_130/raw"], rel=1e-6)
    module.chosen_nfe, measuring.nfe = 2, None
    assert measuring.evaluate(t, module) == {"fid_pixels_130/raw": values["fid_pixels_130_2nfe/raw"]}
    with pytest.raises(ValueError, match=r"metrics.nfe=\[1, 3\]: steps=3: the student takes 1, 2, and no other number"):
        callback(nfe=[1, 3]).check_method(module)
    with pytest.raises(ValueError, match=r"callbacks.metrics.nfe\[0\] must be an integer of at least 1, got 0"):
        both([0])


def test_batch_size_does_not_matter(tmp_path):
    for batch_size in (16, 64):
        fit(tmp_path / str(batch_size), 4, callback(batch_size=batch_size))
    assert logged(tmp_path / "16")["fid_pixels_130/ema_0.5"] == pytest.approx(
        logged(tmp_path / "64")["fid_pixels_130/ema_0.5"], rel=1e-6
    )


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    fit(tmp_path / "with", 9, callback(every_kimg=0.2), Checkpoints(9), precision="bf16-mixed")
    fit(tmp_path / "without", 9, Checkpoints(9), precision="bf16-mixed")
    one, two = (read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("with", "without"))
    assert identical(one["state_dict"], two["state_dict"])
    assert identical(one["optimizer_states"], two["optimizer_states"])


def test_random_state_modes_and_precision(tmp_path):
    module, t = fit(tmp_path, 3, callback())
    module.train()
    module.student[1].eval()
    modes = [m.training for m in module.modules()]
    inner = module.sample

    def sample(noise, labels=None):
        assert not any(m.training for m in module.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        torch.rand(3)
        return inner(noise, labels)

    module.sample = sample
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        values = t.callbacks[1].evaluate(t, module)
    assert values["fid_pixels_130/ema_0.5"] == pytest.approx(logged(tmp_path)["fid_pixels_130/ema_0.5"][3], rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.modules()] == modes


def test_other_metrics_and_no_average(tmp_path):
    t = trainer(tmp_path, 2, [callback(metrics=["fid", "kid", "precision", "recall"])])
    t.fit(method())
    names = [f"{m}_pixels_130/raw" for m in ("fid", "kid", "precision", "recall")]
    assert set(names) <= t.callback_metrics.keys()
    assert 0 <= float(t.callback_metrics[names[2]]) <= 1


def test_published_statistics_stand_for_the_images(tmp_path):
    gaussian = RunningGaussian(8).update(Pixels()(Real.images))
    save_statistics(tmp_path / "real.npz", gaussian.mean, gaussian.cov)
    module = method()
    module.data.reference = None  # not to be called
    published = callback(reference={"file": str(tmp_path / "real.npz")})
    t = trainer(tmp_path / "published", 4, [published], logger=CSVLogger(tmp_path / "published", 100))
    t.fit(module)
    trainer(tmp_path / "images", 4, [callback()], logger=CSVLogger(tmp_path / "images", 100)).fit(method())
    values, expected = (logged(tmp_path / name)["fid_pixels_130/raw"] for name in ("published", "images"))
    assert values == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="kid compare with .*evaluation.reference=null"):
        callback(metrics=["kid"], reference={"file": "x.npz"})


def test_counted():
    assert [metric_with_count("fid", n) for n in (1000, 50000, 1797)] == ["fid_1k", "fid_50k", "fid_1797"]


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="GenerativeMetrics: every_kimg must be positive, got 0"):
        callback(every_kimg=0)
    with pytest.raises(ValueError, match="metrics fud are unknown; choose among fid, kid"):
        callback(metrics=["fud"])
    with pytest.raises(ValueError, match="callbacks.metrics.num_samples must be a whole number of at least 10, got 5"):
        GenerativeMetrics(1, 5, Pixels())
    with pytest.raises(ValueError, match=r"ema_names must be some of \['ema_0.5', 'ema_0.9', 'raw'\], got \['ema_1'\]"):
        fit(tmp_path, 1, callback(ema_names=["ema_1"]))
    with pytest.raises(ValueError, match="GenerativeMetrics must come after EMA in callbacks"):
        trainer(tmp_path, 1, [callback(), EMA()]).fit(method())


def _evaluate_rank(rank, folder):
    module = method()
    count = []
    inner = module.sample
    module.sample = lambda noise, labels=None: count.append(len(noise)) or inner(noise, labels)
    t = trainer(folder, 5, [EMA(AVERAGES), callback()], logger=CSVLogger(folder, 100), **TWO)
    t.fit(module)
    torch.save(
        {"value": float(t.callback_metrics["fid_pixels_130/ema_0.5"]), "count": sum(count)}, folder / f"{rank}.pt"
    )


def test_two_processes_share_the_samples_and_get_the_value_of_one(tmp_path):
    fit(tmp_path / "one", 5, callback())
    (tmp_path / "two").mkdir()
    in_two_processes(_evaluate_rank, tmp_path / "two")
    one, two = (torch.load(tmp_path / f"two/{rank}.pt") for rank in range(2))
    assert one["value"] == two["value"]
    assert one["value"] == pytest.approx(logged(tmp_path / "two")["fid_pixels_130/ema_0.5"][5], rel=1e-6)
    assert one["value"] == pytest.approx(logged(tmp_path / "one")["fid_pixels_130/ema_0.5"][5], rel=1e-5)
    assert one["count"] == two["count"] == 2 * 65
