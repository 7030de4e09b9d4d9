"""The jobs of a sweep or a search: composed, handed to the launcher, and how they ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from launch.errors import EXPECTED, JobFailed, one_line
from launch.run.folder import RunFolder
from launch.sweep.launchers import check_launcher


@dataclass
class Job:
    """overrides: its whole command. options: what tells it from the others. error: why it failed; value: what it returned."""

    overrides: tuple[str, ...]
    options: dict[str, str]
    folder: RunFolder
    error: str | None = None
    value: float | None = None

    @property
    def state(self) -> str:
        """failed, complete, pruned, interrupted (the same command resumes it) or not begun."""
        if self.error is not None:
            return "failed"
        if self.folder.complete():
            return "complete"
        if self.folder.pruned.exists():
            return "pruned"
        return "interrupted" if self.folder.begun() else "not begun"


class Jobs:
    """Makes and launches the jobs of a sweep.

    Raises:
        ValueError: For a launcher that is not installed.
    """

    def __init__(self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        check_launcher(config.hydra.launcher, config.hydra.runtime.choices["hydra/launcher"])
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def job(self, overrides: Sequence[str], options: dict[str, str]) -> Job:
        """Compose one job. Hydra's errors of overrides that do not compose pass."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        place = Path(OmegaConf.select(config, "hydra.sweep.dir")) / OmegaConf.select(config, "hydra.sweep.subdir")
        return Job(tuple(overrides), options, RunFolder(place))

    def launch(self, jobs: Sequence[Job], first: int = 0) -> None:
        """Run them, with numbers from `first` on, and note in each what came of it."""
        try:
            returns = self._launcher.launch([job.overrides for job in jobs], initial_job_idx=first)
        except Exception as error:  # of the launcher: a worker that died takes its answer with it
            for job in jobs:
                if not job.folder.complete():
                    job.error = f"its launcher stopped: {type(error).__name__}: {one_line(error)}"
            return
        for job, returned in zip(jobs, returns, strict=True):
            _note(job, returned)


def _note(job: Job, returned: JobReturn) -> None:
    if returned.status == JobStatus.COMPLETED:
        job.value = returned.return_value
        return
    error = returned._return_value  # the property would raise it
    named = isinstance(error, (JobFailed, *EXPECTED))
    job.error = one_line(error) if named else f"{type(error).__name__}: {one_line(error)}"
