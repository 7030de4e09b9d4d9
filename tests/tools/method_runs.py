"""Any method of conf/method trained for two steps on small data with a shrunken network; its gradients and logs are kept."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from support_matrix import METHODS, ROOT, TWINS, Case
from torch import Tensor

from launch.run.build import build, build_seeded, build_stages, build_trainer, fit_stages
from launch.run.folder import RunFolder
from launch.run.names import register_resolvers
from lightning_modules import Method

__all__ = ["METHODS", "Run", "config", "train", "twins_slow"]
BATCH, STEPS = 5, 2


def twins_slow(cases: Iterable[str]) -> list[Any]:
    """Parameters of a test: names of methods, or of cases of them; those of `support_matrix.TWINS` are marked as slow."""
    return [pytest.param(case, marks=pytest.mark.slow if case in TWINS else ()) for case in cases]


@dataclass
class Recorder(pl.Callback):
    """Gradients at each optimiser step, and what was logged in each training step."""

    gradients: list[list[Tensor]] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Method, optimizer: Any) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([p.grad.clone() for p in own if p.grad is not None])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("speed/")})


@dataclass
class Run:
    method: Method
    trainer: pl.Trainer
    gradients: list[list[Tensor]]
    logged: list[dict[str, float]]


@cache
def composed(name: str, data: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return Case(name, data, "edm").config([])


def config(name: str, changes: dict[str, Any], data: str = "digits") -> DictConfig:
    """name: one of METHODS. changes: values by dotted key."""
    cfg = deepcopy(composed(name, data))
    batch = BATCH + -BATCH % cfg.method.get("group_size", 1)  # of whole groups
    small = {"batch_size": batch, "method.kimg": batch * STEPS / 1000, "trainer.log_every_n_steps": 1}
    with open_dict(cfg):
        for teacher in cfg.method.teachers if "teachers" in cfg.method else [cfg.teacher]:
            teacher.network.dropout = 0.0  # whose masks belong to a pass
        for key, value in (small | changes).items():
            OmegaConf.update(cfg, key, value)
    return cfg


def train(
    name: str,
    changes: dict[str, Any] | None = None,
    *callbacks: pl.Callback,
    data: str = "digits",
    resume: str | None = None,
) -> Run:
    """Train in the current folder, as train.py does; `callbacks` come after all others; resume: a checkpoint."""
    cfg = config(name, changes or {}, data)
    images, method = build(cfg.data), build_seeded(cfg.method, cfg.seed)
    training = method.training_data(images)
    folder = RunFolder(cfg.folder)
    stages = build_stages(cfg, method, images, folder)
    trainer = build_trainer(cfg, method, folder)
    fit_stages(stages, method, folder)
    recorder = Recorder()
    trainer.callbacks += [recorder, *callbacks]
    trainer.fit(method, training, ckpt_path=resume)
    return Run(method, trainer, recorder.gradients, recorder.logged)
