"""A step's batch in parts that the device's memory holds: a backward pass each, and the gradient of the whole batch."""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from stillhouse.ranks import averaged, rank_and_world


@dataclass(frozen=True)
class Part:
    """The part of the batch in work: its share of the images, and whether it is the first and the last one."""

    share: float = 1.0
    first: bool = True
    last: bool = True


WHOLE = Part()


class InParts(pl.LightningModule):
    """Steps whose batch is split where `micro_batch` says so; without it nothing here computes anything.

    micro_batch: the most images of one backward pass on each device; None for all of the device's share. The parts are as
    equal as possible, their losses are weighted by their share of the images, and the optimiser steps once.

    Subclasses with automatic optimisation implement `training_loss`; what is drawn or computed over the whole batch belongs
    into `drawn`, before it is split. Those with manual optimisation go over `parts` and hand each loss to `descend_part`.
    """

    micro_batch: int | None = None
    part = WHOLE
    rehearsing = False
    _gradients_begun = False

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, Tensor | float] = {}

    # -- of a method -----------------------------------------------------------------------------------------------

    def drawn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with all that its loss needs and that no part can make by itself; tensors (B, ...) by name."""
        return batch

    def training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss, a scalar, of a whole batch or a part of one, as `drawn` made it."""
        raise NotImplementedError(f"{type(self).__name__} has neither a training_loss nor a training_step")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.notes.clear()
        loss = self.batch_loss(self.drawn(batch))
        self.log_means(self.notes)
        return loss

    # -- of several processes --------------------------------------------------------------------------------------

    def log_means(self, means: Mapping[str, Tensor | float], *, stepped: bool = False) -> None:
        """Log means over the batch, given those over this process's share; stepped: whether after the optimiser's step.

        Of several processes only at the steps whose values are written: to average them takes a collective.
        """
        if rank_and_world()[1] == 1 or (self.trainer.global_step + (not stepped)) % self.trainer.log_every_n_steps == 0:
            self.log_dict(averaged(means, self.device))

    # -- the parts -------------------------------------------------------------------------------------------------

    def note(self, name: str, value: Tensor | float) -> None:
        """Log a mean over the batch, given that over the part in work."""
        self.tally(self.notes, name, value)

    def tally(self, totals: MutableMapping[str, Any], name: str, value: Tensor | float) -> None:
        """Make totals[name] the mean over all parts so far, each by its share of the batch."""
        if self.part is not WHOLE:
            value = self.part.share * value + (0 if self.part.first else totals[name])
        totals[name] = value

    def parts(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The batch in parts of at most `micro_batch` images; `part` says which one is in work."""
        size = len(next(iter(batch.values())))
        count = math.ceil(size / self.micro_batch) if self.micro_batch else 1
        if count == 1:
            yield batch
            return
        ends = [size * i // count for i in range(count + 1)]
        for i, (start, end) in enumerate(pairwise(ends)):
            self.part = Part((end - start) / size, i == 0, i == count - 1)
            yield {name: values[start:end] for name, values in batch.items()}
        self.part = WHOLE

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The whole batch's loss, whose gradient is that of the last part: the others' lie in the parameters already."""
        loss, before = None, 0
        for part in self.parts(batch):
            if self.part.first and not self.part.last and not self.rehearsing:
                self.optimizers(use_pl_optimizer=False).zero_grad()
                self._gradients_begun = True  # Lightning would clear them before the last part's
            loss = self.training_loss(part)
            if self.part is not WHOLE:
                loss = self.part.share * loss
                if not self.part.last:
                    self._backward_alone(loss)
                    before = before + loss.detach()
                else:
                    loss = before + loss
        return loss

    def descend_part(self, loss: Tensor) -> bool:
        """The backward pass of the part in work, by manual optimisation; returns whether the optimiser's step is due."""
        loss = loss if self.part is WHOLE else self.part.share * loss
        if self.rehearsing or not self.part.last:
            self._backward_alone(loss)
            return False
        self.manual_backward(loss)
        return True

    def _backward_alone(self, loss: Tensor) -> None:
        """Without the exchange between processes, which the last part's pass does for all."""
        if self.rehearsing:  # nor may DDP learn which weights have a gradient, as it does from hooks of theirs
            weights = [p for p in self.parameters() if p.requires_grad]
            found = zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
            self.rehearsed |= {weight: gradient for weight, gradient in found if gradient is not None}
            return
        strategy = self.trainer.strategy
        with getattr(strategy, "block_backward_sync", nullcontext)(), torch.autocast(self.device.type, enabled=False):
            strategy.backward(loss, None)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self._gradients_begun:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        self._gradients_begun = False

    # -- trying how much memory a step takes -----------------------------------------------------------------------

    def rehearse(self, batch: dict[str, Tensor]) -> None:
        """All passes of a step of every kind, without an optimiser's; afterwards nothing but the memory's peak has changed.

        Torch's global random numbers go on, which `seed_step` sets before each step.
        """
        before = {key: copy(value) if type(value) in (dict, list) else value for key, value in self._state().items()}
        self.rehearsing, self.rehearsed = True, {}
        try:
            self.all_passes(batch)
        finally:
            for key in self._state():
                delattr(self, key)
            vars(self).update(before)
            self._gradients_begun = False

    def all_passes(self, batch: dict[str, Tensor]) -> None:
        self._backward_alone(self.batch_loss(self.drawn(batch)))

    def _state(self) -> dict[str, Any]:
        """The plain attributes: no modules, no buffers, nothing of Lightning's."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}
