"""What happens around training: averages, checkpoints, measurements, samples, progress, logs."""

from callbacks.checkpoint import AtomicCheckpointIO, Checkpoints, check_owner, read_checkpoint
from callbacks.clock import Clock
from callbacks.curves import Curves, plot_curves
from callbacks.ema import EMA, RAW, SNAPSHOTS, student_state
from callbacks.generative_metrics import GenerativeMetrics
from callbacks.loggers.csv_logger import CSVLogger
from callbacks.loggers.tensorboard_logger import TensorBoard
from callbacks.loggers.wandb_logger import WandbRun, wandb_logger
from callbacks.non_finite import NonFiniteGuard
from callbacks.progress import Progress
from callbacks.requeue import Requeue
from callbacks.sample_grid import SampleGrid
from callbacks.score_health import ScoreHealth

__all__ = [
    "EMA",
    "RAW",
    "SNAPSHOTS",
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
    "plot_curves",
    "read_checkpoint",
    "student_state",
    "wandb_logger",
]
