"""One file per method."""

from lightning_modules.base import Method
from lightning_modules.denoising_student import DenoisingStudent
from lightning_modules.pretrain import Pretrain

__all__ = ["DenoisingStudent", "Method", "Pretrain"]
