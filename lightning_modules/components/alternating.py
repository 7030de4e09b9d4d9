"""Two networks that learn in turns: whose step is due, clipped gradients, and one loss scale for both."""

import torch
from torch import Tensor, nn

from lightning_modules.components.method import Method


class InTurns(Method):
    """A method with manual optimisation, where each step is of one of its optimisers, or of both at once.

    clip: largest norm of each network's gradient; None: no limit. Set by the method.
    """

    clip: float | None

    def descend(self, which: int | None, loss: Tensor) -> None:
        """A step of optimiser 0 (generator) or 1 (fake score), or None: of both, which counts as one step."""
        optimizers = self.optimizers()
        chosen = optimizers if which is None else [optimizers[which]]
        if self.part.first:
            for optimizer in chosen:
                optimizer.zero_grad()
        if not self.descend_part(loss):
            return
        counted, *others = chosen
        for optimizer in others:  # past Lightning, which counts the steps of its wrappers
            self.step_uncounted(optimizer.optimizer)
        counted.step()

    def step_uncounted(self, optimizer: torch.optim.Optimizer) -> None:
        """As Lightning's step, but for the loss scale's update, which its own step after this one makes for both."""
        if self.scaler is None:
            self.on_before_optimizer_step(optimizer)
            optimizer.step()
            return
        if self.clip:
            self.scaler.unscale_(optimizer)
        self.on_before_optimizer_step(optimizer)
        self.scaler.step(optimizer)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of 16-mixed's losses."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)

    def limit_gradients(self, norm: float) -> None:
        if self.clip is not None:
            raise ValueError(
                f"trainer.gradient_clip_val={norm} and method.clip={self.clip} both limit the norm of each network's gradient; "
                "set one of them to null"
            )
        self.clip = norm
