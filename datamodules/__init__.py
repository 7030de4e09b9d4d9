"""Where images and trajectories come from."""

from datamodules.base import ImageDataModule
from datamodules.digits import Digits
from datamodules.edm_zip import EDMZip
from datamodules.packing import PackedImages, pack
from datamodules.trajectories import TrajectoryDataModule, TrajectoryStore

__all__ = ["Digits", "EDMZip", "ImageDataModule", "PackedImages", "TrajectoryDataModule", "TrajectoryStore", "pack"]
