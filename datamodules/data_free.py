"""Batches for methods that train on their own samples: no images, only positions in the sequence of training samples."""

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.components.batch_loader import Batch, BatchLoader, endless_loader


def _positions(position: int, indices: np.ndarray) -> Batch:
    return {"position": torch.arange(position, position + len(indices))}


class DataFree(pl.LightningDataModule):
    """Batches {"position": int64 (B,)}, from which `stillhouse.diffusion.random_numbers.position_noise` makes noise.

    Args:
        batch_size: Over all processes.

    Raises:
        ValueError: When training starts, for a batch that the devices cannot divide evenly.
    """

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> BatchLoader:
        return endless_loader(self.trainer, _positions, self.batch_size, self.batch_size, seed=0)
