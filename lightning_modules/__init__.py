"""One file per method."""

from lightning_modules.b_dense import BDenseProgressive, BDenseSFD, BDenseStudent
from lightning_modules.base import Method
from lightning_modules.denoising_student import DenoisingStudent
from lightning_modules.diff_instruct import DiffInstruct
from lightning_modules.disback import DisBack
from lightning_modules.pretrain import Pretrain
from lightning_modules.progressive import ProgressiveDistillation
from lightning_modules.sfd import SFD

__all__ = [
    "SFD",
    "BDenseProgressive",
    "BDenseSFD",
    "BDenseStudent",
    "DenoisingStudent",
    "DiffInstruct",
    "DisBack",
    "Method",
    "Pretrain",
    "ProgressiveDistillation",
]
