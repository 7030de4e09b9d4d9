"""Stops a run whose loss or weights have become NaN or infinite, before they reach a checkpoint, or mends its gradients."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.checks import check_choice

# A loss scale that has come down to this from 2^16 was halved 30 times and never grew again: no step was taken in between.
_LEAST_SCALE = 1e-4
_LARGEST = 1e5  # in the place of infinity, as the released codes of ECT, SiD and CMT have it


class NonFiniteError(FloatingPointError):
    """The loss or the weights became NaN or infinite."""


class NonFiniteGuard(pl.Callback):
    """Raises NonFiniteError where the loss was NaN or infinite; it looks every `every_n_steps` steps and at each checkpoint.

    In between the losses are only added up on the device: a sum keeps NaN and infinity, and costs no synchronisation. Of a
    checkpoint all weights are checked too: an overflowing gradient ruins them one step before the loss shows it.

    Under a loss scale (16-mixed) a step whose gradients overflow is skipped, on all processes alike, and halves the scale. Its
    loss does not count; loss_scale/skipped_steps is logged with loss_scale/scale, and the error comes where the scale has
    fallen below 1e-4, since from there on every step is skipped.

    With gradients="replace" training goes on: before each update, and before their norm is limited, 0 takes the place of NaN in
    the gradients and +-1e5 that of infinity. gradient/replaced is logged, the number of values replaced since the run began;
    only weights that are not finite still stop the run, at a checkpoint.
    """

    def __init__(self, every_n_steps: int = 50, gradients: str = "stop") -> None:
        if every_n_steps < 1:
            raise ValueError(f"NonFiniteGuard: every_n_steps must be at least 1, got {every_n_steps}")
        check_choice("callbacks.guard.gradients", gradients, ("stop", "replace"))
        self.every_n_steps, self.replace = every_n_steps, gradients == "replace"
        self._replaced: Tensor | int = 0  # values, since the run began
        self._sum: Tensor | None = None
        self._checked_step = 0
        self._scaler: torch.amp.GradScaler | None = None
        self._skipped: Tensor | int = 0  # steps, since the run began

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sum = torch.zeros((), device=pl_module.device)
        self._checked_step = trainer.global_step
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._scaler is not None:
            self._scale = torch.tensor(self._scaler.get_scale(), device=pl_module.device)
            self._skipped = torch.tensor(self._skipped, device=pl_module.device)
        if self.replace:
            if self._scaler is not None:
                raise ValueError(
                    "callbacks.guard.gradients=replace does not go with trainer.precision=16-mixed, whose loss scale skips steps "
                    "with such gradients by itself: leave it out"
                )
            self._replaced = torch.tensor(self._replaced, device=pl_module.device)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.replace:
            return
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for gradient in [p.grad for p in weights if p.grad is not None]:
            self._replaced += gradient.isfinite().logical_not_().sum()
            gradient.nan_to_num_(nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, dict) or "loss" not in outputs:
            raise ValueError(f"NonFiniteGuard: {type(pl_module).__name__}.training_step must return its loss")
        if self.replace:
            if trainer.global_step % trainer.log_every_n_steps == 0:
                pl_module.log("gradient/replaced", self._replaced.float(), rank_zero_only=True)
            return
        loss = outputs["loss"].detach().float()
        if self._scaler is not None:
            before, self._scale = self._scale, self._scaler._scale.clone()  # get_scale would wait for the device
            skipped = self._scale < before
            self._skipped += skipped
            loss = torch.where(skipped, 0.0, loss)
            if trainer.global_step % trainer.log_every_n_steps == 0:
                values = {"loss_scale/scale": self._scale, "loss_scale/skipped_steps": self._skipped.float()}
                pl_module.log_dict(values, rank_zero_only=True)
        self._sum += loss
        if trainer.global_step % self.every_n_steps == 0:
            self._check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._sum is not None:
            self._check(trainer)
        names = [k for k, v in checkpoint["state_dict"].items() if v.is_floating_point() and v.numel()]
        if names:
            largest = torch.stack(torch._foreach_norm([checkpoint["state_dict"][k] for k in names], float("inf")))
            finite = torch.isfinite(largest).tolist()
            if not all(finite):
                bad = names[finite.index(False)]
                raise NonFiniteError(f"{bad} is not finite after step {trainer.global_step}. {_advice(trainer)}")

    def state_dict(self) -> dict[str, Any]:
        skipped = {"skipped": int(self._skipped)} if self._scaler is not None else {}
        return skipped | ({"replaced": int(self._replaced)} if self.replace else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._replaced = state_dict.get("skipped", 0), state_dict.get("replaced", 0)

    def _check(self, trainer: pl.Trainer) -> None:
        # Rank zero writes the checkpoint: it has to know of the losses of all.
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sum)
        total = self._sum.item()
        first, self._checked_step = self._checked_step + 1, trainer.global_step
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the loss became {'NaN' if math.isnan(total) else total} within steps {first} to {trainer.global_step}. "
                + _advice(trainer)
            )
        self._sum.zero_()
        if self._scaler is not None and self._scale < _LEAST_SCALE:
            raise NonFiniteError(
                f"gradients overflow in every step: by step {trainer.global_step} the loss scale of 16-mixed has fallen to "
                f"{self._scale:.2g}, and {self._skipped} steps were skipped. {_advice(trainer)}"
            )


def _advice(trainer: pl.Trainer) -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    kept = f"The last good checkpoint is {last}" if last.exists() else "No checkpoint had been written yet"
    return f"{kept}. Try a lower method.lr or trainer.precision=32-true or bf16-mixed, under a new run name"
