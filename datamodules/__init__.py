"""Where images and trajectories come from."""

from datamodules.base import ImageDataModule
from datamodules.digits import Digits
from datamodules.packing import PackedImages, pack
from datamodules.trajectories import TrajectoryDataModule, TrajectoryStore

__all__ = ["Digits", "ImageDataModule", "PackedImages", "TrajectoryDataModule", "TrajectoryStore", "pack"]
