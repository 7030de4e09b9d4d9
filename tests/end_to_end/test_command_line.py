"""What a user types: help, the same command again, sweeps, loggers, and what a run leaves behind."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from end_to_end_tools import (
    ENVIRONMENT,
    ROOT,
    RUN,
    STUDENT,
    assert_identical,
    copied,
    leaves,
    read_checkpoint,
    read_csv,
    read_json,
    snapshot,
    train,
    with_data,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from wandb_tools import history

from stillhouse.analysis.curves import reference_lines
from stillhouse.diffusion.random_numbers import MONITOR_SEEDS

# -- asking -----------------------------------------------------------------------------------------------------------


CONF = ROOT / "conf"


def groups():
    return {path.parent.name for path in CONF.glob("*/*.yaml")} - {"local"}


def asked(script, *arguments):
    """Standard output and the modules that were imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if "import time" in line}


@pytest.mark.parametrize("options", [["--help"], ["--cfg", "job"]])
def test_help_may_go_to_a_reader_that_ends_first(tmp_path, options):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "train.py"), *options]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_help_shows_the_choices_without_loading_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, modules = asked("train.py", "--help")
    assert groups() >= {"method", "data", "teacher", "trainer", "logger", "callbacks", "evaluation"}
    for group in groups():
        assert f"{group}: {', '.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}" in out
    assert "target_noise: 0.0" in out
    assert "python train.py -m seed=0,1,2" in out
    assert "hydra" in modules
    assert not {"torch", "pytorch_lightning", "numpy"} & modules
    assert not list(tmp_path.iterdir())


def test_evaluate_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, modules = asked("evaluate.py", "--help")
    assert "python evaluate.py teacher=digits" in out
    assert "num_samples: null" in out
    assert "torch" not in modules
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_config_and_its_sources_are_shown(tmp_path):
    config = yaml.safe_load(train(tmp_path, "--cfg", "job", "--resolve", "seed=3").ok().out)
    assert config["method"]["seed"] == config["data"]["seed"] == 3
    assert config["name"] == "denoising_student-digits-seed3"
    defaults = train(tmp_path, "--info", "defaults").ok().out
    for file in ("method/denoising_student", "data/digits", "teacher/digits", "evaluation/digits", "logger/default"):
        assert file in defaults
    assert not snapshot(tmp_path)


# -- a finished run ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_issue_promises(finished):
    folder = finished / RUN
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = "config.yaml checkpoints/last.ckpt checkpoints/best.ckpt metrics.csv metrics.json samples.png curves.png"
    assert set(names.split()) | {"interpolation.png", "samples/000000.080.png", "student.safetensors"} <= files
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in files)
    records = read_json(folder / "metrics.json")
    subjects = {record["subject"]: record for record in records}
    assert set(subjects) == {"teacher", "student", "real"}
    assert [subjects[s]["nfe"] for s in ("teacher", "student", "real")] == [3, 1, 0]
    for record in records:
        assert record["metric"] == "fid_digits"
        assert len(record["values"]) == 2
        assert record["mean"] == pytest.approx(sum(record["values"]) / 2)
        assert record["fingerprint"]["num_samples"] == 20
    card = json.loads((folder / "student.json").read_text())
    assert card["command"].startswith("python train.py name=run batch_size=16 ")
    assert card["metrics"]["fid_digits/student"]["values"] == subjects["student"]["values"]
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 14))
    assert all(math.isfinite(float(row["loss/student"])) for row in rows)
    assert [row["step"] for row in rows if row["heldout/loss"]] == ["4", "8", "12"]
    assert [row["step"] for row in rows if row["fid_digits_20/ema_500kimg"]] == ["5", "10", "13"]


def test_the_lines_of_a_curve_are_measured_as_the_curve(finished):
    """Teacher and real images on the same seeds, as many and in one block; nothing of the final blocks, which score otherwise."""
    lines = reference_lines(finished / RUN / "monitoring.json")
    assert lines.keys() == {"fid_digits_20"}  # the column of the curve
    assert lines["fid_digits_20"].keys() == {"teacher (3 NFE)", "real"}
    final = {record["subject"]: record for record in read_json(finished / RUN / "metrics.json")}
    for record in read_json(finished / RUN / "monitoring.json"):
        assert record["fingerprint"] == final[record["subject"]]["fingerprint"] | {
            "seeds": [MONITOR_SEEDS, MONITOR_SEEDS + 19]
        }
        assert len(record["values"]) == 1
        assert record["mean"] != pytest.approx(final[record["subject"]]["mean"], rel=1e-3)


def test_the_checkpoint_is_the_student_alone(finished):
    """Loads as plain tensors; the student, its two Adam moments and one average, and no teacher anywhere."""
    path = finished / RUN / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert checkpoint["global_step"] == 13
    assert all(key.startswith("student.") for key in checkpoint["state_dict"])
    assert "teacher" not in " ".join(leaves(checkpoint)).lower()
    student = sum(v.numel() * v.element_size() for v in checkpoint["state_dict"].values())
    tensors = [v for v in leaves(checkpoint).values() if isinstance(v, Tensor)]
    assert sum(v.numel() * v.element_size() for v in tensors) < 4.02 * student
    assert path.stat().st_size < 4.02 * student + 1000 * len(tensors)  # names and checksums
    exported = load_file(finished / RUN / "student.safetensors")
    best = read_checkpoint(path.with_name("best.ckpt"))["callbacks"]["EMA"]["averages"]["ema_500kimg"]
    assert_identical(exported, {k.removeprefix("network."): best[k] for k in best})


def test_the_same_command_again_says_that_the_run_is_complete(finished):
    before = snapshot(finished)
    out = train(finished, *STUDENT).ok().out
    assert "runs/run is complete" in out
    assert re.search(r"run +student \(ema_500kimg\) +1 +\d", out)
    assert snapshot(finished) == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_changed_config_is_refused(finished, tmp_path, complete):
    copied(finished, tmp_path)
    if not complete:
        (tmp_path / RUN / "metrics.json").unlink()
    before = snapshot(tmp_path)
    refused = train(tmp_path, *STUDENT, "method.lr=0.5", "method.loss=l1")
    refused.refused("runs/run", "method.lr=0.001", "method.lr=0.5", "method.loss", "choose another name=")
    assert snapshot(tmp_path) == before


def test_a_run_below_a_folder_of_runs_says_the_recipe_that_it_takes_by_itself(tmp_path):
    assert "recipe=sfd_digits, " in train(tmp_path, "method=sfd", "name=tries/a", "plan=true").ok().out
    assert "recipe=" not in train(tmp_path, "method=sfd", "~recipe", "plan=true").ok().out


# -- sweeps -----------------------------------------------------------------------------------------------------------


def folders(path):
    return sorted(folder.name for folder in (path / "runs").iterdir() if folder.is_dir())


def sweep(folder, *arguments):
    """A sweep with STUDENT's options in a config folder of the user's own: those of a command are in its runs' names."""
    local = folder / "conf" / "local" / "default.yaml"
    local.parent.mkdir(parents=True)
    options = OmegaConf.from_dotlist([option for option in STUDENT if not option.startswith("name=")])
    local.write_text(f"# @package _global_\n{OmegaConf.to_yaml(options)}")
    return train(folder, "--multirun", "--config-dir=conf", *arguments)


@pytest.mark.slow
def test_a_sweep_over_seeds_gives_a_run_each(finished, tmp_path):
    with_data(finished, tmp_path)
    sweep(tmp_path, "seed=0,1", "logger=wandb_offline").ok()
    names = [f"denoising_student-digits-seed{seed}-logger-wandb_offline" for seed in (0, 1)]
    assert folders(tmp_path) == names
    zero, one = (tmp_path / "runs" / name for name in names)
    ours, theirs = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (zero, finished / RUN))
    assert_identical(ours["state_dict"], theirs["state_dict"])
    assert_identical(ours["callbacks"]["EMA"], theirs["callbacks"]["EMA"])
    other = read_checkpoint(one / "checkpoints/last.ckpt")["state_dict"]
    assert not all(torch.equal(value, other[key]) for key, value in ours["state_dict"].items())
    assert yaml.safe_load((one / "config.yaml").read_text())["method"]["seed"] == 1
    # wandb knows one run at a time: that of the first job must not go on in the second.
    assert (zero / "wandb_id").read_text() != (one / "wandb_id").read_text()
    for folder in (zero, one):
        (offline,) = (folder / "wandb").glob("offline-run-*")
        assert offline.name.endswith((folder / "wandb_id").read_text())
        assert len(history(offline)) == 13


@pytest.mark.slow
def test_a_sweep_over_numbers_of_processes_is_not_repeated_by_the_second(finished, tmp_path):
    """A job in two processes, then one that must not think that it is still a process of that."""
    with_data(finished, tmp_path)
    ended = sweep(tmp_path, "trainer.devices=2,1").ok()
    names = [f"denoising_student-digits-seed0-trainer.devices-{count}" for count in (1, 2)]
    assert folders(tmp_path) == names
    assert ended.out.count("fingerprint") == 3  # each run's, and the table's
    students = []
    for folder in (tmp_path / "runs" / name for name in names):
        assert [int(row["step"]) for row in read_csv(folder / "metrics.csv")] == list(range(1, 14))
        assert len(list((folder / "tensorboard").glob("events*"))) == 1
        assert (folder / "metrics.json").exists()
        students.append(read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"])
    one, two = students
    assert_identical(one, read_checkpoint(finished / RUN / "checkpoints/last.ckpt")["state_dict"])
    for key, value in two.items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)
