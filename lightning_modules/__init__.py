"""One file per method."""

from lightning_modules.bezier import BezierDistillation
from lightning_modules.cmt import CMT
from lightning_modules.components.method import Method
from lightning_modules.consistency_distillation import ConsistencyDistillation
from lightning_modules.denoising_student import DenoisingStudent
from lightning_modules.diff_instruct import DiffInstruct
from lightning_modules.disback import DisBack
from lightning_modules.dmd2 import DMD2
from lightning_modules.ect import ECT
from lightning_modules.flow_distillation import FlowDistillation
from lightning_modules.imm import IMM
from lightning_modules.mean_flow import MeanFlow
from lightning_modules.moment_matching import MomentMatching
from lightning_modules.pretrain import Pretrain
from lightning_modules.progressive import ProgressiveDistillation
from lightning_modules.rectified_flow import RectifiedFlow, Reflow
from lightning_modules.scm import SCM
from lightning_modules.sfd import SFD
from lightning_modules.sid import SiD
from lightning_modules.sida import SiDA
from lightning_modules.tcm import TCM

__all__ = [
    "CMT",
    "DMD2",
    "ECT",
    "IMM",
    "SCM",
    "SFD",
    "TCM",
    "BezierDistillation",
    "ConsistencyDistillation",
    "DenoisingStudent",
    "DiffInstruct",
    "DisBack",
    "FlowDistillation",
    "MeanFlow",
    "Method",
    "MomentMatching",
    "Pretrain",
    "ProgressiveDistillation",
    "RectifiedFlow",
    "Reflow",
    "SiD",
    "SiDA",
]
