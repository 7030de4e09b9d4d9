"""All stages, in falling value, with their shares of the time."""

from benchmarks.gpu.smoke import SMOKE
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.steps import STEPS

SHARES: dict[Stage, float] = {SMOKE: 60, STEPS: 240}  # seconds of nine minutes
DRY_SHARES: dict[Stage, float] = {SMOKE: 30, STEPS: 15}
