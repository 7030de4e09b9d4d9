"""The lines of a log file and the bar of a terminal."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from tiny_module import TinyMethod, trainer

from callbacks.checkpoint import Checkpoints
from callbacks.loggers.csv_logger import CSVLogger
from callbacks.progress import Progress

LINE = re.compile(r"step (\d+) \| ([\d.]+)/([\d.]+) kimg \| (\d+) img/s \| loss/student ([\d.e-]+) \| ([\d:]+) left")


def lines(capsys):
    matches = [LINE.fullmatch(line) for line in capsys.readouterr().err.splitlines()]
    assert all(matches)
    return [match.groups() for match in matches]


def test_a_line_every_n_images_and_at_the_end(tmp_path, capsys):
    trainer(tmp_path, 9, [Progress(every_kimg=0.2)]).fit(TinyMethod(batch_size=100))
    found = lines(capsys)
    assert [(step, done, total) for step, done, total, *_ in found] == [
        ("2", "0.2", "0.9"),
        ("4", "0.4", "0.9"),
        ("6", "0.6", "0.9"),
        ("8", "0.8", "0.9"),
        ("9", "0.9", "0.9"),
    ]
    assert found[-1][-1] == "00:00"


class Clock(pl.Callback):
    """Time as the test wants it: 0.05 s a batch, 1 s for each batch of `slow`."""

    def __init__(self, monkeypatch, slow=()):
        self.now, self.slow = 0.0, slow
        monkeypatch.setattr("callbacks.progress.time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 1 if trainer.global_step in self.slow else 0.05


def test_speed_is_since_the_line_before(tmp_path, capsys, monkeypatch):
    callbacks = [Clock(monkeypatch, slow=[2, 3]), Progress(every_kimg=0.2)]
    logger = CSVLogger(tmp_path, 100)
    trainer(tmp_path, 6, callbacks, logger=logger, log_every_n_steps=2).fit(TinyMethod(100))
    # 200 images in 0.1 s and in 2 s; the time left goes by the whole run so far
    assert [(line[3], line[5]) for line in lines(capsys)] == [("2000", "00:00"), ("100", "00:01"), ("2000", "00:00")]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        speeds = [float(row["speed/images_per_second"]) for row in csv.DictReader(file)]
    assert speeds == pytest.approx([2000, 100, 2000])


def test_a_line_every_n_seconds(tmp_path, capsys, monkeypatch):
    trainer(tmp_path, 8, [Clock(monkeypatch), Progress(every_seconds=0.14)]).fit(TinyMethod())
    assert [line[0] for line in lines(capsys)] == ["3", "6", "8"]


def test_a_stage_has_its_name_before_each_line(tmp_path, capsys):
    trainer(tmp_path, 1, [Progress(every_kimg=0.1, stage="rounds/4")]).fit(TinyMethod(batch_size=100))
    assert capsys.readouterr().err.startswith("rounds/4 | step 1 | 0.1/0.1 kimg | ")


def test_resumed_runs_count_on(tmp_path, capsys):
    trainer(tmp_path, 2, [Checkpoints(2)]).fit(TinyMethod(100))
    callbacks = [Progress(every_kimg=0.4), Checkpoints(2)]
    trainer(tmp_path, 5, callbacks).fit(TinyMethod(100), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert [line[:3] for line in lines(capsys)] == [("4", "0.4", "0.5"), ("5", "0.5", "0.5")]


def test_a_terminal_gets_a_bar_in_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer(tmp_path, 5, [Progress(every_kimg=0.1)]).fit(TinyMethod(batch_size=100))
    text = capsys.readouterr().err
    assert re.search(r"100%.*500/500 .*img/s, loss/student=", text)
    assert "step 5" not in text


def test_other_ranks_are_silent(tmp_path, capsys, monkeypatch):
    t = trainer(tmp_path, 3, [Progress(every_kimg=0.1)])
    monkeypatch.setattr(type(t), "is_global_zero", property(lambda self: False))
    t.fit(TinyMethod(batch_size=100))
    assert capsys.readouterr().err == ""


def test_misuse():
    with pytest.raises(ValueError, match="Progress: every_kimg must be positive, got 0"):
        Progress(every_kimg=0)
    with pytest.raises(ValueError, match="Progress: every_seconds must not be negative, got -1"):
        Progress(every_seconds=-1)
