"""trainer.micro_batch=auto: the largest part of a batch whose passes the device's memory holds, by trying."""

import gc
import math
import sys
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks import Clock
from launch.errors import out_of_memory
from lightning_modules import Method

_MOMENTS = 2  # of each weight, Adam's, which the first step allocates


class FindMicroBatch(pl.Callback):
    """Before the first step of a start, tries the passes of a step with the whole share, then with half, and so on.

    Nothing of the run changes by it but `method.micro_batch`: no weight, no random number, no place in the data. All processes
    use what the one with the least room can. A resumed run begins with what it had, so that it repeats the same sums.
    """

    def __init__(self) -> None:
        self._size: int | None = None
        self._done = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Method, batch: Any, batch_idx: int) -> None:
        if self._done:
            return
        share = len(next(iter(batch.values())))
        size = min(self._size or share, share)
        clock = Clock.find(trainer)
        with clock.stopped() if clock else nullcontext():
            size = self._largest(trainer, pl_module, batch, size)
        pl_module.micro_batch = self._size = size
        self._done = True
        if trainer.is_global_zero:
            passes = -(-share // size)
            print(
                f"trainer.micro_batch=auto: {size} images of the {share} on each device in a pass, {passes} a step",
                file=sys.stderr,
                flush=True,
            )

    def _largest(self, trainer: pl.Trainer, pl_module: Method, batch: Any, size: int) -> int:
        while not trainer.strategy.reduce_boolean_decision(self._fits(trainer, pl_module, batch, size)):
            group = pl_module.group_size
            if size <= group:
                least = "a single image" if group == 1 else f"a group of {group} images"
                raise ValueError(
                    f"trainer.micro_batch=auto: the memory does not hold the passes of {least}; take a smaller network, "
                    "a device with more memory, or trainer.precision=bf16-mixed"
                )
            size = math.ceil(size / (2 * group)) * group
        return size

    def _fits(self, trainer: pl.Trainer, method: Method, batch: Any, size: int) -> bool:
        method.micro_batch = size
        moments = []
        try:
            moments += [torch.empty_like(p) for p in _fresh(trainer) for _ in range(_MOMENTS)]
            with trainer.precision_plugin.train_step_context():
                method.try_memory(batch)
            return True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        finally:
            moments.clear()
        gc.collect()  # the failed passes' tensors, which their traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._size = state_dict["micro_batch"]


def _fresh(trainer: pl.Trainer) -> list[torch.Tensor]:
    """The weights whose moments are still to be allocated."""
    return [p for o in trainer.optimizers for group in o.param_groups for p in group["params"] if not o.state.get(p)]
