"""Where images and trajectories come from."""

from datamodules.base import ImageDataModule
from datamodules.data_free import DataFree
from datamodules.digits import Digits
from datamodules.edm_zip import EDMZip
from datamodules.packing import PackedImages, pack
from datamodules.planar import Planar
from datamodules.trajectories import TrajectoryDataModule, TrajectoryStore

__all__ = [
    "DataFree",
    "Digits",
    "EDMZip",
    "ImageDataModule",
    "PackedImages",
    "Planar",
    "TrajectoryDataModule",
    "TrajectoryStore",
    "pack",
]
