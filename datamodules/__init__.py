"""Data sets: where training images, a teacher's trajectories, or batches without images come from.

A data set of one's own is a subclass of `PixelDataModule` (files that become pixels once) or of `ImageDataModule`.
"""

from datamodules.celeba import CelebA
from datamodules.cifar10 import CIFAR10
from datamodules.components.edm_zip import EDMZip
from datamodules.components.encoded_images import EncodedImages, pack_encoded
from datamodules.components.file_datamodule import (
    EncodedDataModule,
    FileDataModule,
    ImageSource,
    PictureDataModule,
    PixelDataModule,
    array_source,
    picture_source,
)
from datamodules.components.image_datamodule import ImageDataModule
from datamodules.components.packed_images import PackedImages, pack
from datamodules.data_free import DataFree
from datamodules.digits import Digits
from datamodules.fashion_mnist import FashionMNIST
from datamodules.ffhq import FFHQ
from datamodules.image_folder import ImageFolder
from datamodules.imagenet import ImageNet
from datamodules.imagenet_downsampled import DownsampledImageNet
from datamodules.lsun import LSUN
from datamodules.plane_points import PlanePoints
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
    "EncodedDataModule",
    "EncodedImages",
    "FashionMNIST",
    "FileDataModule",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "ImageSource",
    "PackedImages",
    "PictureDataModule",
    "PixelDataModule",
    "PlanePoints",
    "TrajectoryDataModule",
    "TrajectoryStore",
    "array_source",
    "pack",
    "pack_encoded",
    "picture_source",
]
