"""Denoising Student as a plain PyTorch loop: what the framework's step is measured against."""

import copy

import torch
from torch import Tensor

from datamodules import TrajectoryDataModule
from datamodules.components.sample_order import EpochOrder
from datamodules.components.trajectory_store import decode
from lightning_modules import DenoisingStudent
from stillhouse.diffusion.losses import regression
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise

DECAY = 0.999


class BareLoop:
    """Batches, forward, loss, backward, Adam and the average of the weights, and nothing else.

    It starts from a copy of the method's student, and takes the same batches at the same learning rate: the losses are
    those of the framework. `losses` keeps them on the device.
    """

    def __init__(self, method: DenoisingStudent, data: TrajectoryDataModule):
        self.device, self.distance = method.device, method.distance
        self.student = copy.deepcopy(method.student)
        self.parameters = list(self.student.parameters())
        self.optimizer = method.build_optimizer(self.parameters, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.sigma = torch.tensor(method.sigmas[0].item(), device=self.device)
        self.prior_std = self.student.preconditioning.prior_std(self.sigma)
        self.store, self.num_classes = data.train_stores[0], data.num_classes
        self.order = EpochOrder(len(self.store), data.seed)
        self.position, self.batch_size = 0, data.batch_size
        self.losses: list[Tensor] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            noise, labels, target = self._batch()
            self.optimizer.zero_grad()
            loss = regression(self.student(self.prior_std * noise, self.sigma, labels), target, self.distance).mean()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)
            self.losses.append(loss.detach())

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor]:
        indices = self.order.batch(self.position, self.batch_size)
        self.position += self.batch_size
        seeds = self._to_device(torch.from_numpy(indices + self.store.first_seed))
        target = decode(self._to_device(self.store.states(indices)))[:, -1]
        return sample_noise(seeds, self.store.image_shape), sample_labels(seeds, self.num_classes), target

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
