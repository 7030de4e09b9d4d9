"""metrics.csv is the same file whether or not the run was interrupted."""

import csv
import os
import resource
import signal

import pytest
import torch
from tiny_module import TinyMethod, trainer

from callbacks.checkpoint import Checkpoints
from callbacks.loggers.csv_logger import CSVLogger


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fit(folder, steps, ckpt_path=None, **options):
    logger = CSVLogger(folder, batch_size=4)
    t = trainer(folder, steps, [Checkpoints(4)], validate_every=3, logger=logger, **options)
    t.fit(TinyMethod(), ckpt_path=ckpt_path)


def test_one_row_per_step_with_steps_taken_and_images_seen(tmp_path):
    fit(tmp_path, 8, log_every_n_steps=2)
    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["2", "3", "4", "6", "8"]  # 3 and 6 validate, even steps log
    assert [row["nimg"] for row in table] == ["8", "12", "16", "24", "32"]
    assert list(table[0])[:2] == ["step", "nimg"]
    both = table[3]
    assert float(both["loss/student"]) > 0
    assert float(both["heldout/loss"]) > 0
    assert table[0]["heldout/loss"] == ""


def test_resume_gives_the_uninterrupted_file(tmp_path):
    fit(tmp_path / "whole", 10)
    fit(tmp_path / "cut", 7)
    checkpoint = tmp_path / "cut/checkpoints/last.ckpt"
    assert rows(tmp_path / "cut")[-1]["step"] == "7"
    # a kill at step 7 finds the checkpoint of step 4
    t = trainer(tmp_path / "early", 4, [Checkpoints(4)], validate_every=3, logger=CSVLogger(tmp_path / "early", 4))
    t.fit(TinyMethod())
    (tmp_path / "early/checkpoints/last.ckpt").replace(checkpoint)
    fit(tmp_path / "cut", 10, ckpt_path=checkpoint)
    assert (tmp_path / "cut/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_new_keys_late_values_and_earlier_steps(tmp_path):
    logger = CSVLogger(tmp_path, batch_size=10)
    logger.log_metrics({"a": 1.5}, step=0)
    logger.log_metrics({"a": torch.tensor(2.0), "b, odd": 3}, step=1)
    logger.log_metrics({"b, odd": 4}, step=1)
    logger.log_metrics({"a": 5}, step=2)
    logger.log_metrics({"c": 6}, step=0)  # known later than the rows after it
    logger.log_metrics({"a": 7}, step=3)
    assert rows(tmp_path) == [
        {"step": "1", "nimg": "10", "a": "1.5", "b, odd": "", "c": "6"},
        {"step": "2", "nimg": "20", "a": "2.0", "b, odd": "4", "c": ""},
        {"step": "3", "nimg": "30", "a": "5", "b, odd": "", "c": ""},
        {"step": "4", "nimg": "40", "a": "7", "b, odd": "", "c": ""},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_new_process_drops_later_rows_and_a_torn_line(tmp_path):
    first = CSVLogger(tmp_path, batch_size=10)
    for step in range(6):
        first.log_metrics({"a": step + 0.25}, step=step)
    second = CSVLogger(tmp_path, batch_size=10)
    assert len(rows(tmp_path)) == 6  # nothing is touched before something is logged
    second.log_metrics({"b": 9}, step=3)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("1", "0.25", ""),
        ("2", "1.25", ""),
        ("3", "2.25", ""),
        ("4", "3.25", "9"),  # the values of a step may come from two processes
    ]
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,50,1")
    second = CSVLogger(tmp_path, batch_size=10)
    second.log_metrics({"a": 4.123456}, step=5)
    second.log_metrics({"a": -1}, step=5)  # a shorter line
    assert [row["a"] for row in rows(tmp_path)] == ["0.25", "1.25", "2.25", "3.25", "-1"]
    assert rows(tmp_path)[-1]["step"] == "6"


def test_misuse(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics.csv does not begin with the columns step,nimg: move that file away"):
        CSVLogger(tmp_path, batch_size=4).log_metrics({"a": 1}, step=0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,2\n"
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CSVLogger(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="needs the step"):
        CSVLogger(tmp_path, batch_size=4).log_metrics({"a": 1})


def test_a_full_disk_names_the_file(tmp_path):
    logger = CSVLogger(tmp_path, batch_size=4)
    logger.log_metrics({"a": 1}, step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(OSError, match=r"cannot write .*metrics.csv: File too large. Make room and run again"):
            logger.log_metrics({"a": 0.123456789}, step=1)
        with pytest.raises(OSError, match=r"cannot write .*metrics.csv"):
            logger.log_metrics({"another": 0.123456789}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    CSVLogger(tmp_path, batch_size=4).log_metrics({"a": 2}, step=1)
    assert [row["a"] for row in rows(tmp_path)] == ["1", "2"]
