"""The smallest method and data that the callbacks can be tested with."""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from stillhouse.diffusion.random_numbers import seed_step

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")
warnings.filterwarnings("ignore", module="lightning_fabric")


class Positions(IterableDataset):
    """An endless stream that begins where the trainer is: the position in it is the datum."""

    def __init__(self, module: "TinyMethod") -> None:
        self.module = module

    def __iter__(self):
        start = self.module.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        while True:
            yield start
            start += 1


class Plain:
    """A teacher: an object that may be neither registered nor copied."""

    def __init__(self) -> None:
        self.weight = torch.ones(3)

    def __deepcopy__(self, memo):
        raise AssertionError("the teacher was copied")


class TinyMethod(pl.LightningModule):
    """Regresses noise on itself through one convolution; `bad_step` makes the loss NaN there, `skip` skips the student."""

    monitor = None
    chosen_nfe = None
    student_updated = True

    def __init__(
        self, batch_size: int = 4, channels: int = 1, resolution: int = 4, bad_step: int = -1, skip=()
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.student = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Dropout(0.5)
        )
        with torch.no_grad():
            for p in self.student.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.other = nn.Linear(2, 2)
        nn.init.ones_(self.other.weight), nn.init.zeros_(self.other.bias)
        self.teacher = Plain()
        self.name, self.seed, self.batch_size, self.nfe = "tiny", 0, batch_size, 1
        self.bad_step, self.skip = bad_step, set(skip)
        self.shape = (channels, resolution, resolution)
        sizes = {"resolution": resolution, "channels": channels, "num_classes": 0}
        self.data = SimpleNamespace(name="tiny", held_out=lambda: None, **sizes)
        self.seen: list[int] = []
        self.student_states: list[dict[str, Tensor]] = []

    @property
    def nimg(self) -> int:
        return self.trainer.global_step * self.batch_size

    @property
    def student_updates(self) -> int:
        return self.trainer.global_step

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        seed_step(self.seed, 0, self.trainer.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(int(batch))
        x = torch.randn(self.batch_size, *self.shape)
        loss = (self.student(x) - x).square().mean() + 0.01 * batch.float().mean()
        if self.trainer.global_step == self.bad_step:
            loss = loss * float("nan")
        self.student_updated = self.trainer.global_step not in self.skip
        if not self.student_updated:
            loss = loss * 0
        self.log("loss/student", loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self.student_states.append({k: v.clone() for k, v in self.student.state_dict().items()})

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(8, *self.shape, generator=generator)
        self.log("heldout/loss", (self.student(x) - x).square().mean(), batch_size=8)

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.student(noise).tanh()

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=0.02)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Positions(self), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0, 1], batch_size=1)


def identical(one, two) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(identical(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(identical, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def trainer(folder: Path, max_steps: int, callbacks=(), validate_every: int | None = None, **options) -> pl.Trainer:
    """A quiet one-process trainer, set up as conf/trainer/default does it."""
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1} | options
    options.setdefault("limit_val_batches", 1.0 if validate_every else 0)
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        use_distributed_sampler=False,
        **options,
    )


TWO = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}
