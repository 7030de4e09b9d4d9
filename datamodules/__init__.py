"""Where images and trajectories come from."""

from datamodules.base import ImageDataModule
from datamodules.celeba import CelebA
from datamodules.cifar10 import CIFAR10
from datamodules.data_free import DataFree
from datamodules.digits import Digits
from datamodules.edm_zip import EDMZip
from datamodules.encoded import EncodedImages, pack_encoded
from datamodules.ffhq import FFHQ
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.imagenet_downsampled import DownsampledImageNet
from datamodules.lsun import LSUN
from datamodules.packing import PackedImages, pack
from datamodules.planar import Planar
from datamodules.trajectories import TrajectoryDataModule, TrajectoryStore

__all__ = [
    "CIFAR10",
    "FFHQ",
    "LSUN",
    "CelebA",
    "DataFree",
    "Digits",
    "DownsampledImageNet",
    "EDMZip",
    "EncodedImages",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "PackedImages",
    "Planar",
    "TrajectoryDataModule",
    "TrajectoryStore",
    "pack",
    "pack_encoded",
]
