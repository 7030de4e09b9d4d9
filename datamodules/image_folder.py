"""Any pictures of one's own, in a folder or a zip."""

from PIL import Image, ImageOps

from datamodules.files import Files, folder_classes
from datamodules.packing import PackedImages, way_out
from datamodules.pictures import CENTRE_CROP, centre_crop
from datamodules.sources import PixelDataModule, Source, picture_source


class ImageFolder(PixelDataModule):
    """All pictures below `path`, upright, the middle square of each; its first folders are the classes if num_classes > 0.

    Errors: ValueError where the pictures are no more those that were packed under this name.
    """

    get = "set data.path to a folder or zip of pictures"

    def source(self) -> Source:
        files = Files(self.path)
        labels = folder_classes(files, self.classes) if self.classes else None
        return picture_source(self.name, files, self._crop, f"upright by EXIF, {CENTRE_CROP}", labels)

    def _crop(self, image: Image.Image, where: str) -> Image.Image:
        return centre_crop(ImageOps.exif_transpose(image), self.resolution)

    def reference(self) -> PackedImages:
        packed = super().reference()
        if self.path.exists() and (now := self.source().description) != packed.meta["source"]:
            raise ValueError(
                f"{self.path} has changed since {self.folder} was packed of it ({packed.meta['source']}; now {now}): "
                f"{way_out(self.folder)}, or set data.name"
            )
        return packed
