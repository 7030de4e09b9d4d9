"""Any pictures of one's own, in a folder or a zip."""

from typing import Any

from PIL import Image, ImageOps

from datamodules.components.file_datamodule import ImageSource, PictureDataModule, PixelDataModule, picture_source
from datamodules.components.picture_decoding import CENTRE_CROP, centre_crop
from datamodules.components.picture_files import CLASS_ORDERS, PictureFiles, class_folders, class_table, folder_classes


class ImageFolder(PictureDataModule, PixelDataModule):
    """All pictures below a folder or in a zip, upright, the middle square of each.

    Args:
        channels: 3, or 1: grey, of which Pillow makes the luma of ITU-R 601, rounded, before it shrinks the picture.
        path: The folder or zip; its first folders are the classes if num_classes > 0.
        class_order: text numbers the folders 1, 10, 2, as EDM's dataset_tool does; natural numbers them 1, 2, 10.
        max_aspect: Pictures more than so many times as long as wide are refused; None: none are.
    """

    how_to_get = "set data.path to a folder or zip of pictures"
    other_channels = (1,)

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        path: str,
        class_order: str = "text",
        max_aspect: float | None = 10,
        **common,
    ):
        super().__init__(name, root, path=path, max_aspect=max_aspect, **common)
        if class_order not in CLASS_ORDERS:
            raise ValueError(f"data.class_order={class_order!r} is unknown; choose one of {', '.join(CLASS_ORDERS)}")
        if class_order != "text" and not self.classes:
            raise ValueError(f"data.class_order={class_order} has no effect without classes; set data.num_classes")
        self.class_order = class_order

    @property
    def pixel_options(self) -> dict[str, Any]:
        return {**super().pixel_options, "class_order": self.class_order}

    def class_table(self) -> str | None:
        if not (self.classes and self.has_source()):
            return None
        return class_table(class_folders(PictureFiles(self.path), self.classes, self.class_order), orders=True)

    def source(self) -> ImageSource:
        files = PictureFiles(self.path)
        folders = class_folders(files, self.classes, self.class_order) if self.classes else []
        labels = folder_classes(files, folders) if self.classes else None
        steps = f"upright by EXIF, {CENTRE_CROP}" if self.channels == 3 else f"upright by EXIF, grey, {CENTRE_CROP}"
        return picture_source(self.name, files, self.rules, self._crop, steps, labels)

    def _crop(self, image: Image.Image, where: str) -> Image.Image:
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception as error:  # Pillow's are of many kinds
            raise OSError(
                f"{where} has damaged EXIF data, which say what is up ({error}); remove them, or take the picture out"
            ) from error
        return centre_crop(upright if self.channels == 3 else upright.convert("L"), self.resolution)
