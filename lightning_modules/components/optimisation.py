"""The optimisation engine: how a method's loss becomes updates of its networks, the same for one network and for several.

An update is: the batch in micro-batches, a backward pass each; gradients averaged over processes; their norm limited; one step of
each optimiser concerned; gradients dropped. Lightning's precision plugins scale the loss, its strategies average.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from stillhouse.ranks import apart_from_others, average_over_ranks

Batch = dict[str, Tensor]


class MicroBatch(NamedTuple):
    """The micro-batch in work: its share of the batch's images, and whether it is the first and the last one of the batch."""

    share: float = 1.0
    first: bool = True
    last: bool = True


class Optimisation(pl.LightningModule):
    """The half of `Method` (method.py) that Lightning calls; a method's author need not read it.

    It calls the other half's `trained_networks`, `prepare`, `loss` and `after_update`.

    micro_batch: the most images of one backward pass on each device; None for all of the device's share. Micro-batches are as
    equal as possible, their losses are weighted by their share of the images, and the optimiser steps once.
    group_size: images, side by side in the batch, that one term of the loss is of; a micro-batch has whole groups, at least one.
    gradient_clip: largest norm of each network's gradient, or None; set by `trainer.gradient_clip_val`.
    means: the latest mean over the batch of everything that `log_mean` was given, those of the other updates included.
    """

    micro_batch: int | None = None
    group_size: int = 1
    gradient_clip: float | None = None
    update_cycle: Sequence[tuple[str, ...]]
    cycle_start: int = 0
    _current = MicroBatch()

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.means: dict[str, Tensor | float] = {}
        self._step = 0  # the training step under way
        self._memory_trial: dict[nn.Parameter, Tensor] | None = None  # gradients of `try_memory`

    # -- a training step -------------------------------------------------------------------------------------------

    def train_on(self, batch: Batch) -> Tensor:
        """One training step; returns its loss. A method with several updates in a step calls `update` for each."""
        return self.update(self.prepare(batch))

    @property
    def updating(self) -> tuple[str, ...]:
        """The networks that the training step under way updates; between steps, those that the latest one updated."""
        return self.update_cycle[max(self._step - self.cycle_start, 0) % len(self.update_cycle)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._step = self.trainer.global_step  # the optimiser counts on before the step is over
        loss = self.train_on(batch)
        self.after_update()
        step = self.trainer.global_step
        if step == 1 or step % self.trainer.log_every_n_steps == 0:  # the first for what shows progress, not for a row
            self.log_dict(self.metrics(average_over_ranks(self.means, self.device)))
        return loss

    def metrics(self, means: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        """What is logged, given the means over the batch of all processes; a method may add what follows from several."""
        return dict(means)

    def update(
        self,
        batch: Batch,
        loss: Callable[[Batch], Tensor] | None = None,
        *,
        last: bool = True,
    ) -> Tensor:
        """One update of the networks that `updating` names.

        Args:
            batch: Tensors (B, ...) by name, this process's share.
            loss: From a micro-batch to its mean loss, a scalar; None: `self.loss`.
            last: Whether it is the training step's last one, which counts the step.

        Returns:
            The mean loss over the batch, a scalar without a graph.
        """
        optimizers = self._wrapped_optimizers(self.updating)
        total: Tensor | float = 0.0
        for micro_batch in self.micro_batches(batch):
            value = (loss or self.loss)(micro_batch)
            if self._current.share < 1:
                value = self._current.share * value
            self._backward(value)
            total = total + value.detach()
        if self._memory_trial is None:
            with torch.autocast(self.device.type, enabled=False):
                self._take_step(optimizers, last)
            # At once and not in these networks' next update: their memory is free until then, also for a CUDA graph to overwrite.
            for optimizer in optimizers:
                optimizer.zero_grad()
        return total

    def log_mean(self, name: str, value: Tensor | float) -> None:
        """Log a mean over the batch, given that over the micro-batch in work (of any shape, without a graph)."""
        if self._current.share < 1:
            value = self._current.share * value + (0 if self._current.first else self.means[name])
        self.means[name] = value

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """The batch in micro-batches of whole groups and at most `micro_batch` images, as equal as possible."""
        size = len(next(iter(batch.values())))
        groups = size // self.group_size
        count = math.ceil(groups / max(self.micro_batch // self.group_size, 1)) if self.micro_batch else 1
        if count == 1:
            yield batch
            return
        ends = [groups * i // count * self.group_size for i in range(count + 1)]
        for i, (start, end) in enumerate(pairwise(ends)):
            self._current = MicroBatch((end - start) / size, i == 0, i == count - 1)
            yield {name: values[start:end] for name, values in batch.items()}
        self._current = MicroBatch()

    def _backward(self, loss: Tensor) -> None:
        """Of several micro-batches the last one's pass averages over processes, for all."""
        if (
            self._memory_trial is not None
        ):  # nor may DDP learn which weights have a gradient, as it does from hooks of theirs
            weights = [p for p in self.parameters() if p.requires_grad]
            gradients = zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
            self._memory_trial |= {weight: gradient for weight, gradient in gradients if gradient is not None}
            return
        strategy = self.trainer.strategy
        alone = nullcontext if self._current.last else getattr(strategy, "block_backward_sync", nullcontext)
        with alone(), torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    # -- optimisers ------------------------------------------------------------------------------------------------

    def _wrapped_optimizers(self, names: Sequence[str]) -> list[Any]:
        """Lightning's wrappers, which count the training steps."""
        found = self.optimizers()
        found = found if isinstance(found, list) else [found]
        by_name = dict(zip(self.trained_networks(), found, strict=True))
        return [by_name[name] for name in names]

    def _take_step(self, optimizers: Sequence[Any], last: bool) -> None:
        counted, *others = optimizers
        for (
            optimizer
        ) in others:  # past Lightning, which would count each as a step and change the loss scale after each
            self._step_beside(optimizer.optimizer)
        if last:
            counted.step()
        else:
            self.trainer.strategy.optimizer_step(counted.optimizer, lambda: None, self)

    def _step_beside(self, optimizer: torch.optim.Optimizer) -> None:
        scaler = self.scaler
        if scaler is not None and self.gradient_clip:
            scaler.unscale_(optimizer)
        for each in self.trainer.callbacks:  # before the method, as in Lightning
            each.on_before_optimizer_step(self.trainer, self, optimizer)
        self.on_before_optimizer_step(optimizer)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of 16-mixed's losses."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.gradient_clip:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.gradient_clip)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        means = average_over_ranks(self.means, self.device)
        checkpoint["means"] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in means.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.means = dict(checkpoint.get("means", {}))  # none of runs from before they were kept

    def on_fit_start(self) -> None:
        self.means = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self.means.items()}

    # -- how much memory a step takes ------------------------------------------------------------------------------

    def try_memory(self, batch: Batch) -> None:
        """All passes of a training step of every kind, without an optimiser's; afterwards only the memory's peak has changed.

        Torch's global random numbers go on, which are seeded before each step.
        """
        before = {key: copy(value) if type(value) in (dict, list) else value for key, value in self._state().items()}
        self._memory_trial = {}
        try:
            with apart_from_others():
                for kind in dict.fromkeys(self.update_cycle):
                    self._step = self.cycle_start + self.update_cycle.index(kind)
                    self.train_on(batch)
        finally:
            for key in self._state():
                delattr(self, key)
            vars(self).update(before)
            self._memory_trial, self._current = None, MicroBatch()

    def _state(self) -> dict[str, Any]:
        """The plain attributes: no modules, no buffers, nothing of Lightning's."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}
