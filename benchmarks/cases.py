"""What is trained for the benchmarks: the default config, and the same at CIFAR-10 size."""

import sys
from dataclasses import dataclass

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.measuring import ROOT
from launch.run.build import build_seeded, build_trainer
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from lightning_modules import Method
from stillhouse.checkpoints.weights import find_weights


@dataclass(frozen=True)
class Case:
    """A network to train and how long to measure it.

    overrides: on the default config. pair_steps: solver steps behind the stored pairs (None: the teacher's own).
    warmup: steps before the first figure. window: steps behind one figure, a multiple of trainer.log_every_n_steps, so
    that each figure has its share of logging. rounds: figures. sampling_rounds: the same for sampling. cycles: of score
    distillation behind one figure, an update of each kind; cycle_rounds: figures.
    """

    title: str
    overrides: tuple[str, ...] = ()
    pair_steps: int | None = None
    warmup: int = 20
    window: int = 20
    rounds: int = 11
    sampling_rounds: int = 5
    cycles: int = 10
    cycle_rounds: int = 5


DIGITS = Case("digits, as in conf/")
# EDM's DDPM++ for CIFAR-10 (arXiv 2206.00364, table 7), unconditional. The student has no dropout: the method is so.
CIFAR10 = Case(
    "EDM CIFAR-10 architecture (DDPM++), random weights",
    overrides=(
        "batch_size=4",
        "data.resolution=32",
        "data.channels=3",
        "data.num_classes=0",
        "teacher.name=cifar10_random",
        "teacher.weights=null",
        "teacher.sha256=null",
        "teacher.network.model_channels=128",
        "teacher.network.channel_mult=[2,2,2]",
        "teacher.network.num_blocks=4",
        "teacher.network.attn_resolutions=[16]",
        "teacher.network.dropout=0.13",
        "teacher.network.label_dropout=0",
        "teacher.steps=18",
    ),
    pair_steps=1,
    warmup=10,
    window=10,
    rounds=5,
    sampling_rounds=3,
    cycles=1,
    cycle_rounds=4,
)


def compose_config(case: Case, folder: str, *overrides: str) -> DictConfig:
    """The config of `python train.py` in `folder`, without what is no part of a step and without the user's conf/local.

    overrides: of the benchmark, beside the case's own.
    """
    left_out = [f"callbacks.{name}=null" for name in ("grid", "metrics", "curves")]
    places = [f"folder={folder}/run", f"data.root={folder}"]
    left_out += ["~local"] if (ROOT / "conf" / "local").exists() else []
    # Without a ramp of the learning rate the bare loop's losses can be compared with the framework's.
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*left_out, *places, "method.warmup_kimg=0", *case.overrides, *overrides])
    if cfg.teacher.get("weights") is not None:  # without a teacher it holds the choice of guidance alone
        try:
            find_weights(cfg.teacher.weights)
        except FileNotFoundError:
            cfg.teacher.weights = cfg.teacher.sha256 = None
    return cfg


def prepare(cfg: DictConfig, steps: int, timer: pl.Callback) -> tuple[Method, pl.Trainer]:
    """A method and a trainer of `steps` steps, with a callback after all others."""
    # Not within a window by chance: checkpoints are timed apart, and a validation is no part of a step.
    cfg.callbacks.checkpoints.every_n_steps = cfg.trainer.validate_every_n_steps = sys.maxsize
    method = build_seeded(cfg.method, cfg.seed)
    method.total_steps = steps + 1  # at its last step a run writes
    trainer = build_trainer(cfg, method, RunFolder(cfg.folder))
    trainer.callbacks.append(timer)
    return method, trainer
