"""ImageNet: EDM's zip, or the class folders of ILSVRC 2012, cut and shrunk as EDM's dataset_tool does."""

from PIL import Image

from datamodules.components.edm_zip import edm_source
from datamodules.components.file_datamodule import ImageSource, PictureDataModule, PixelDataModule, picture_source
from datamodules.components.picture_decoding import CENTRE_CROP, centre_crop
from datamodules.components.picture_files import PictureFiles, class_folders, class_table, folder_classes, is_edm_zip


class ImageNet(PictureDataModule, PixelDataModule):
    """1,281,167 training images in a thousand classes, numbered by their sorted WordNet names as EDM's teachers do.

    Args:
        path: EDM's zip with its dataset.json, or ILSVRC/Data/CLS-LOC/train (or a zip of it) with n01440764/*.JPEG and so on.
            Both give the same images, except for the few of ILSVRC in CMYK, whose four values EDM's tool reads as three; here
            they are converted.
    """

    how_to_get = "get ILSVRC 2012's training images, or EDM's zip of them, and set data.path"

    def source(self) -> ImageSource:
        if is_edm_zip(self.path):
            return edm_source(self.path, self.resolution, self.classes)
        files = PictureFiles(self.path)
        labels = folder_classes(files, class_folders(files, self.classes)) if self.classes else None
        return picture_source(self.name, files, self.rules, self._crop, CENTRE_CROP, labels)

    def class_table(self) -> str | None:
        if not (self.classes and self.has_source()) or is_edm_zip(self.path):
            return None
        return class_table(class_folders(PictureFiles(self.path), self.classes))

    def _crop(self, image: Image.Image, where: str) -> Image.Image:
        return centre_crop(image, self.resolution)
