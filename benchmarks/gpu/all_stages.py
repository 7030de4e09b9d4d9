"""All stages, in falling value, with their shares of the time."""

from benchmarks.gpu.dmd2 import DMD2
from benchmarks.gpu.sampling import SAMPLING
from benchmarks.gpu.several import SEVERAL
from benchmarks.gpu.smoke import SMOKE
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.steps import STEPS

# Seconds of nine minutes.
SHARES: dict[Stage, float] = {SMOKE: 75, STEPS: 210, SAMPLING: 80, DMD2: 110, SEVERAL: 65}
DRY_SHARES: dict[Stage, float] = {SMOKE: 30, STEPS: 15, SAMPLING: 15, DMD2: 60, SEVERAL: 0}
