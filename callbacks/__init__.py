"""What happens around training."""

from callbacks.checkpoint import AtomicCheckpointIO, Checkpoints, check_owner, read_checkpoint
from callbacks.clock import Clock
from callbacks.csv_logger import CSVLogger
from callbacks.curves import Curves, draw_curves, reference_lines
from callbacks.ema import EMA, student_state
from callbacks.generative_metrics import GenerativeMetrics
from callbacks.non_finite import NonFiniteGuard
from callbacks.progress import Progress
from callbacks.requeue import Requeue
from callbacks.sample_grid import SampleGrid
from callbacks.score_health import ScoreHealth
from callbacks.tensorboard_logger import TensorBoard
from callbacks.wandb_logger import WandbRun, wandb_logger

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "CSVLogger",
    "Checkpoints",
    "Clock",
    "Curves",
    "GenerativeMetrics",
    "NonFiniteGuard",
    "Progress",
    "Requeue",
    "SampleGrid",
    "ScoreHealth",
    "TensorBoard",
    "WandbRun",
    "check_owner",
    "draw_curves",
    "read_checkpoint",
    "reference_lines",
    "student_state",
    "wandb_logger",
]
