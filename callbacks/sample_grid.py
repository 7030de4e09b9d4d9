"""Image grids of the same samples as training goes on."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from callbacks.components.evaluation_mode import evaluation_mode
from callbacks.components.intervals import check_every_kimg, interval_reached
from callbacks.ema import student_weights
from stillhouse.checks import check_memory
from stillhouse.pictures.samples import image_shape, save_progress_picture


class SampleGrid(pl.Callback):
    """Writes samples of the evaluation seeds 0 .. rows * columns - 1 by the first average, every `every_kimg` thousand images.

    They go to <run folder>/samples/KIMG.png (six digits), and to TensorBoard and W&B where those loggers are. Small images are
    enlarged to about 32 pixels; points of the plane are 2,000 over as many real ones. It must come after EMA among the
    trainer's callbacks.
    """

    def __init__(self, every_kimg: float, rows: int = 8, columns: int = 10) -> None:
        self.every_kimg = check_every_kimg("SampleGrid", every_kimg)
        if rows < 1 or columns < 1:
            raise ValueError(f"SampleGrid: rows and columns must be at least 1, got {rows} and {columns}")
        self.rows, self.columns = rows, columns

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        student_weights(trainer, self, None)
        pixels = self.rows * self.columns * math.prod(image_shape(pl_module.data))
        check_memory(4 * pixels, f"callbacks.grid of {self.rows} rows and {self.columns} columns (lower them)")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if interval_reached(trainer, pl_module, self.every_kimg):
            self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = float(self.every_kimg).is_integer()
        name = f"{pl_module.nimg // 1000:06d}" if whole else f"{pl_module.nimg / 1000:010.3f}"
        path = Path(trainer.default_root_dir) / "samples" / f"{name}.png"
        (weights,) = student_weights(trainer, self, None).values()
        with evaluation_mode(pl_module), weights(pl_module):
            picture = save_progress_picture(
                path, pl_module.sample, pl_module.data, pl_module.device, self.rows, self.columns
            )
        for logger in trainer.loggers:
            step = trainer.global_step - 1  # Lightning's own number of this batch
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", picture, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples/student", [picture], step=step)
