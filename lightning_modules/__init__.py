"""One file per method."""

from lightning_modules.base import Method
from lightning_modules.denoising_student import DenoisingStudent
from lightning_modules.diff_instruct import DiffInstruct
from lightning_modules.disback import DisBack
from lightning_modules.pretrain import Pretrain

__all__ = ["DenoisingStudent", "DiffInstruct", "DisBack", "Method", "Pretrain"]
