"""MedMNIST: small medical pictures of one kind each, from the .npz file that is published (Yang et al., arXiv 2110.14795)."""

import zipfile

from datamodules import ImageSource, PixelDataModule, array_source
from stillhouse.checkpoints.bounds import read_arrays


class MedMNIST(PixelDataModule):
    """The training images of a file in RGB, such as bloodmnist.npz, in its order.

    Args:
        path: The file.
    """

    how_to_get = "get the file from medmnist.com and set data.path"

    def source(self) -> ImageSource:
        try:
            images, labels = read_arrays(self.path, ["train_images", "train_labels"])
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise OSError(f"{self.path} is damaged ({error}); get it again") from error
        if images is None or labels is None or images.shape[1:] != (self.resolution, self.resolution, 3):
            raise ValueError(
                f"{self.path} holds no train_images of {self.resolution}x{self.resolution} in RGB: correct data.resolution"
            )
        labels = labels[:, 0].astype(int) if self.classes else None
        return array_source(images.transpose(0, 3, 1, 2), labels, description=f"{self.path.name}, train_images")
