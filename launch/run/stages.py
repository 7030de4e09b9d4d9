"""What a method has trained before it, such as DisBack's degradation path: fits of their own, resumed like the run's."""

import copy
import gc
import json
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from launch.process_environment import is_rank_zero
from launch.run.build import build_trainer
from launch.run.folder import RunFolder
from lightning_modules import Method
from stillhouse.files import write_file

_CALLBACKS = ("clock", "checkpoints", "guard", "progress", "requeue")  # nothing of a stage is sampled


@dataclass(frozen=True)
class Stage:
    method: Method
    data: pl.LightningDataModule
    trainer: pl.Trainer
    folder: RunFolder


def build_stages(config: DictConfig, method: Method, data: Any, folder: RunFolder, here: bool = True) -> list[Stage]:
    """The method's stages, each with a trainer of the run's kind that keeps its files in runs/NAME/STAGE.

    here: as of `build_trainer`.
    """
    stages = []
    for name, module in method.stages().items():
        part = RunFolder(folder.path / name)
        cfg = copy.deepcopy(config)
        cfg.folder, cfg.batch_size = str(part.path), module.batch_size
        kept = (*_CALLBACKS, "ema") if module.averaged_stage else _CALLBACKS
        cfg.callbacks = {key: value for key, value in cfg.callbacks.items() if key in kept}
        cfg.logger = {key: value for key, value in cfg.logger.items() if key == "csv"}
        trainer = build_trainer(cfg, module, part, here)
        stages.append(Stage(module, module.training_data(data), trainer, part))
    return stages


def fit_stages(stages: list[Stage], method: Method, folder: RunFolder) -> None:
    """Train what is missing, and note what it cost in preparation.json."""
    for stage in stages:
        stage.trainer.fit(stage.method, stage.data, ckpt_path=stage.folder.resume())
        if is_rank_zero():
            stage.folder.last.unlink(missing_ok=True)  # what the stage is for lies elsewhere, complete
        stage.trainer.strategy.optimizers = []  # whose moments nobody needs any more
        gc.collect()  # DDP's hooks in networks that stages share go with it
    cost = method.preparation(folder.path)
    if cost is not None and is_rank_zero():
        write_file(folder.preparation, (json.dumps(cost, indent=1) + "\n").encode())
