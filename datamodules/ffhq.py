"""FFHQ: EDM's zip, or the published pictures in a folder or zip, shrunk as EDM's dataset_tool does."""

from PIL import Image

from datamodules.components.edm_zip import edm_source
from datamodules.components.file_datamodule import ImageSource, PictureDataModule, PixelDataModule, picture_source
from datamodules.components.picture_files import PictureFiles, is_edm_zip


class FFHQ(PictureDataModule, PixelDataModule):
    """70,000 faces, without classes.

    Args:
        path: EDM's zip, or a folder or zip of images1024x1024 or of thumbnails128x128. Shrunk, these two differ; EDM's zip,
            on which its teacher was trained, comes from images1024x1024.
    """

    how_to_get = "get images1024x1024 or thumbnails128x128, or EDM's zip, and set data.path"

    def source(self) -> ImageSource:
        if is_edm_zip(self.path):
            return edm_source(self.path, self.resolution, self.classes)
        if self.classes:
            raise ValueError(f"data.num_classes={self.classes}: FFHQ has no classes; set data.num_classes=0")
        preprocessing = "Pillow's Lanczos to the resolution, as EDM's dataset_tool"
        return picture_source(self.name, PictureFiles(self.path), self.rules, self._shrink, preprocessing, None)

    def _shrink(self, image: Image.Image, where: str) -> Image.Image:
        side = (self.resolution, self.resolution)
        if image.width != image.height or image.width < self.resolution:
            raise ValueError(
                f"{where} has {image.width}x{image.height} pixels, no square of {side[0]} or more as FFHQ's are; "
                "take it out or set data.path"
            )
        return image if image.size == side else image.resize(side, Image.Resampling.LANCZOS)
