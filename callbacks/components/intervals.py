"""When a callback acts: at multiples of a number of images, so that a resumed run acts where an uninterrupted one does."""

import pytorch_lightning as pl


def check_every_kimg(owner: str, every_kimg: float) -> float:
    """Return `every_kimg`, in thousands of images.

    Raises:
        ValueError: in the name of `owner`, unless it is positive.
    """
    if not every_kimg > 0:
        raise ValueError(f"{owner}: every_kimg must be positive, got {every_kimg}")
    return every_kimg


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended is the last of the run."""
    return trainer.global_step == trainer.max_steps or trainer.should_stop


def interval_reached(trainer: pl.Trainer, pl_module: pl.LightningModule, every_kimg: float | None) -> bool:
    """Whether the batch that just ended reached a multiple of `every_kimg` thousand images (None: never), or is the last.

    Ask in on_train_batch_end: it comes before the checkpoint of that batch, so that an interrupted action is repeated.
    """
    if is_last_step(trainer):
        return True
    if every_kimg is None:
        return False
    interval = max(1, round(1000 * every_kimg))
    return pl_module.nimg // interval > (pl_module.nimg - pl_module.batch_size) // interval
