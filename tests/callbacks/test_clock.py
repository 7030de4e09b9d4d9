"""Seconds of training: what counts, what does not, and that they go on after a resume."""

import csv
from types import SimpleNamespace

import pytorch_lightning as pl
from test_generative_metrics import Pixels, Real
from tiny_module import TinyMethod, trainer

from callbacks.checkpoint import Checkpoints
from callbacks.clock import Clock
from callbacks.components.evaluation_mode import evaluation_mode
from callbacks.generative_metrics import GenerativeMetrics
from callbacks.loggers.csv_logger import CSVLogger


class Time(pl.Callback):
    """1 s a training step, 10 s a validation, 100 s for what a callback does aside, after the step `at`."""

    def __init__(self, monkeypatch, at=()):
        self.now, self.at = 0.0, at
        monkeypatch.setattr("callbacks.clock.time", SimpleNamespace(perf_counter=lambda: self.now))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 1

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 5

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.at:
            with evaluation_mode(pl_module):
                self.now += 100


def test_training_counts_and_validation_and_measurements_do_not(tmp_path, monkeypatch):
    clock = Clock()
    trainer(tmp_path, 6, [clock, Time(monkeypatch, at=(2, 3))], validate_every=4).fit(TinyMethod())
    assert clock.seconds() == 6


def test_it_goes_on_after_a_resume(tmp_path, monkeypatch):
    callbacks = lambda: [Clock(), Time(monkeypatch, at=(2,)), Checkpoints(every_n_steps=4)]  # noqa: E731
    trainer(tmp_path, 5, callbacks()).fit(TinyMethod())
    again = callbacks()
    trainer(tmp_path, 7, again).fit(TinyMethod(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert again[0].seconds() == 7


def test_measurements_note_it_with_the_students_updates(tmp_path, monkeypatch):
    module = TinyMethod(batch_size=100)
    module.data.reference = Real
    metrics = GenerativeMetrics(0.2, 130, Pixels(), cache_folder=None)
    callbacks = [Clock(), Time(monkeypatch, at=(1,)), metrics]
    trainer(tmp_path, 4, callbacks, logger=CSVLogger(tmp_path, 100)).fit(module)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["speed/training_seconds"]]
    assert [(r["progress/student_updates"], float(r["speed/training_seconds"])) for r in rows] == [("2", 2), ("4", 4)]
