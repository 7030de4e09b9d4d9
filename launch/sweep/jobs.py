"""The jobs of a sweep or a search: composed, handed to one of Hydra's launchers, and how they ended."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from launch.errors import EXPECTED, JobFailed, JobInUse, one_line
from launch.run.folder import RunFolder
from stillhouse.analysis.curves import Curve, read_curve
from stillhouse.file_locks import try_lock

_EXTRAS = {"hydra_joblib_launcher": "joblib", "hydra_submitit_launcher": "submitit"}
_TRAIN = Path(__file__).resolve().parents[2] / "train.py"
_gpu: FileLock | None = None  # held until this worker ends


def check_extra(module: str, extra: str, option: str) -> None:
    """Check that a package is installed which an option asks for.

    Raises:
        ValueError: With the command that installs it, where `option` asks for a package that is not here.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{option} needs the package {module}: pip install -e '.[{extra}]'")


def check_launcher(launcher: DictConfig, name: str) -> None:
    """Check that a launcher's packages are installed.

    Raises:
        ValueError: For a launcher (hydra.launcher, chosen by `name`) whose packages are missing.
    """
    plugin = _plugin(launcher)
    if plugin in _EXTRAS:
        extra = _EXTRAS[plugin]
        for module in (extra, f"hydra_plugins.{plugin}"):
            check_extra(module, extra, f"hydra/launcher={name}")


@contextmanager
def placed(trainer: DictConfig, launcher: DictConfig) -> Iterator[None]:
    """Around a job in the worker of a launcher: the program is train.py to what repeats or records its command.

    Under joblib each worker reserves a GPU, as long as it lives.

    Raises:
        ValueError: Under joblib, for a job of several processes or for more workers than GPUs.
    """
    plugin = _plugin(launcher)
    if plugin not in _EXTRAS:
        yield
        return
    if at_once(launcher):
        _check_one_device(trainer)
        if trainer.accelerator != "cpu":
            _reserve_gpu(launcher.n_jobs)
    main, argv, name = sys.modules["__main__"], sys.argv, os.environ.get("SLURM_JOB_NAME")
    specification = main.__spec__
    main.__spec__, sys.argv = None, [str(_TRAIN), *argv[1:]]
    if name is not None:
        os.environ["SLURM_JOB_NAME"] = "interactive"  # Lightning then starts the node's processes itself: srun has not
    try:
        yield
    finally:
        main.__spec__, sys.argv = specification, argv
        if name is not None:
            os.environ["SLURM_JOB_NAME"] = name


def at_once(launcher: DictConfig) -> bool:
    """Whether several jobs run at once and write to one terminal: joblib's."""
    return _plugin(launcher) == "hydra_joblib_launcher"


def _plugin(launcher: DictConfig) -> str:
    return launcher._target_.split(".")[1]


def _check_one_device(trainer: DictConfig) -> None:
    from launch.run.processes import process_count

    if trainer.devices in ("auto", -1, "-1"):  # the worker sees the one that it took
        return
    if process_count(trainer.devices, trainer.num_nodes, trainer.accelerator) > 1:
        raise ValueError(
            f"trainer.devices={trainer.devices} under hydra/launcher=joblib, where each of several jobs at once has one "
            "device; leave the launcher out, or take hydra/launcher=submitit_slurm"
        )


def _reserve_gpu(jobs: int) -> None:
    """Show this process one GPU that no other worker on this machine has reserved.

    By locks, not by the job's number: jobs last unequally long, and a worker runs several.
    """
    import torch

    global _gpu
    count = torch.cuda.device_count()
    if _gpu is not None or count == 0:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    for name in names:
        path = Path(tempfile.gettempdir()) / f"stillhouse-{os.getuid()}-gpu-{name.replace('/', '-')}.lock"
        _gpu = try_lock(path, "set TMPDIR to a folder on another")
        if _gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = name  # before anything of this process has touched CUDA
            return
    raise ValueError(
        f"hydra.launcher.n_jobs={jobs}, but the {count} GPUs here are taken by other workers; give n_jobs={count} at most"
    )


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        overrides: Its whole command.
        options: Those by which it differs from the other jobs.
        folder: Its run's.
        error: Why it failed, or did not come to its end.
        value: What it returned.
        under_way: Whether it has no end yet, and no fault of its own: its launcher died, or it still runs under an earlier one.
    """

    overrides: tuple[str, ...]
    options: dict[str, str]
    folder: RunFolder
    error: str | None = None
    value: float | None = None
    under_way: bool = False

    @property
    def state(self) -> str:
        """Its state: failed, complete, pruned, interrupted (the same command resumes it) or not begun."""
        if self.error is not None and not self.under_way:
            return "failed"
        if self.folder.complete():
            return "complete"
        if self.folder.pruned.exists():
            return "pruned"
        return "interrupted" if self.folder.begun() else "not begun"


def curve_on_the_way(folder: RunFolder, needed: bool = False) -> Curve | None:
    """A run's curve, of the first average or the weights as trained; None for a run without one.

    It is of the monitoring seeds, by which runs may be chosen, never of those of the final evaluation.

    Raises:
        ValueError, OSError: With `needed`, as `read_curve`.
    """
    try:
        return read_curve(folder.path, folder.name, seed=0)
    except (OSError, ValueError):
        if needed:
            raise
        return None


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

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return a job's config, with Hydra's part. Hydra's errors of overrides that do not compose pass."""
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))

    def job(self, overrides: Sequence[str], options: dict[str, str]) -> Job:
        """Compose one job. Hydra's errors of overrides that do not compose pass."""
        config = self.compose(overrides)
        place = Path(OmegaConf.select(config, "hydra.sweep.dir")) / OmegaConf.select(config, "hydra.sweep.subdir")
        return Job(tuple(overrides), options, RunFolder(place))

    def launch(self, jobs: Sequence[Job], first: int = 0) -> None:
        """Run jobs, numbered from `first` on, and store in each its error or value.

        Where the launcher dies, the answers are lost: what has come to its end says so in its folder, the others are under way.
        """
        try:
            returns = self._launcher.launch([job.overrides for job in jobs], initial_job_idx=first)
        except Exception as error:  # of the launcher, such as of a worker that was killed
            for job in jobs:
                if job.state not in ("complete", "pruned"):
                    job.error = f"its launcher stopped: {type(error).__name__}: {one_line(error)}"
                    job.under_way = True
            return
        for job, returned in zip(jobs, returns, strict=True):
            _store_outcome(job, returned)


def _store_outcome(job: Job, returned: JobReturn) -> None:
    if returned.status == JobStatus.COMPLETED:
        job.value = returned.return_value
        return
    error = returned._return_value  # the property would raise it
    job.under_way = isinstance(error, JobInUse)
    named = isinstance(error, (JobFailed, *EXPECTED))
    job.error = one_line(error) if named else f"{type(error).__name__}: {one_line(error)}"
