"""A run's folder as a method with its trained student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from callbacks import RAW, SNAPSHOTS, check_owner, read_checkpoint, student_state
from launch import option_types
from launch.run.build import build_seeded
from launch.run.folder import RunFolder
from launch.run.remote_files import fetch
from lightning_modules import Method
from stillhouse.checkpoints.posthoc_average import reconstructed
from stillhouse.checkpoints.weights import checked_load
from stillhouse.metrics.sampling import Sampler
from stillhouse.ranks import rank_and_world

_POSTHOC = "posthoc_"  # how names of averages begin that are made of a run's snapshots


@dataclass(frozen=True)
class Weights:
    """Which of a run's weights a student has.

    Attributes:
        name: An average's, or raw.
        training: See `Record.training`.
    """

    name: str
    training: Mapping[str, int] | None = None


@dataclass(frozen=True)
class TrainedRun:
    """A run with its trained student in place.

    Attributes:
        folder: The run's.
        config: The run's config, of plain values.
        method: Samples by the trained student.
        weights: Which of the run's weights the student has.
    """

    folder: RunFolder
    config: DictConfig
    method: Method
    weights: Weights

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        weights: str | None = None,
        checkpoint: str | None = None,
        download: bool = False,
    ) -> "TrainedRun":
        """Build a run's method as its config describes it and load the student.

        Args:
            path: The run's folder.
            weights: An average's name, raw, or posthoc_W, the average of relative width W that is made of the run's snapshots
                (None: the run's first average).
            checkpoint: best or last (None: the best by held-out loss where the method has one).
            download: Whether to fetch first what the run's config names and this machine lacks.

        Raises:
            ValueError: For a folder that is damaged, or whose config would build something else than this project's classes.
            FileNotFoundError: For a folder without a run or checkpoint.
        """
        folder = RunFolder(path)
        config = folder.read_config()
        if lacking := [part for part in ("method", "data", "evaluation", "seed") if part not in config]:
            raise ValueError(f"{folder.config} lacks {', '.join(lacking)}; restore or remove it")
        for part in (config.method, config.data, config.evaluation):
            option_types.check_targets(part)  # before any of them is built
        if download:
            fetch(OmegaConf.to_container(config))
        method = build_seeded(config.method, config.seed)
        return cls(folder, config, method, load_student(method, folder, weights, checkpoint))

    def at_steps(self, count: int) -> "TrainedRun":
        """Return the run whose student takes `count` steps, of the same method, which changes in place.

        Raises:
            ValueError: For a number that the run has no student for.
        """
        return replace(self, weights=choose_steps(self.method, self.folder, count, self.weights))


def load_student(
    method: Method,
    folder: RunFolder,
    weights: str | None = None,
    checkpoint: str | None = None,
    reached: int | None = None,
) -> Weights:
    """Load a run's trained student into `method`.

    Args:
        method: The run's.
        folder: The run's.
        weights: As of `TrainedRun.load`.
        checkpoint: best or last (None: the best by held-out loss where the method has one).
        reached: Training steps of the run so far (None: read from its files).

    Returns:
        Which weights were loaded.

    Raises:
        ValueError: For a checkpoint that is damaged or another run's, or an average that it lacks.
        FileNotFoundError: For a checkpoint that is not there.
    """
    checkpoint, content = _read_chosen(method, folder, checkpoint)
    width = _posthoc_width(weights)
    name, state = student_state(content, weights if width is None else RAW)
    if width is not None:
        name = f"{_POSTHOC}{width:g}"
        averaged, distance = reconstructed(folder.path / SNAPSHOTS, width)
        state |= averaged
        if rank_and_world()[0] == 0:
            print(
                f"{name} is made of the averages in {folder.path / SNAPSHOTS}, its profile met to {distance:.1%}",
                flush=True,
            )
    with checked_load(folder.checkpoints / f"{checkpoint}.ckpt", state, method.student):
        method.student.load_state_dict(state)
    method.on_load_checkpoint(content)  # in progressive distillation the round, hence the number of steps
    step = content["global_step"]
    if reached is None:
        another = not folder.complete() and checkpoint != "last" and folder.last.exists()
        reached = read_checkpoint(folder.last)["global_step"] if another else step
    total = method.total_steps
    return Weights(name, {"step": step, "reached": total if folder.complete() else reached, "total": total})


def _posthoc_width(weights: str | None) -> float | None:
    """Return W of posthoc_W, None of other names. Raises ValueError where it is no number."""
    if not isinstance(weights, str) or not weights.startswith(_POSTHOC):
        return None
    try:
        return float(weights.removeprefix(_POSTHOC))
    except ValueError:
        raise ValueError(f"weights={weights} must end with a relative width, such as {_POSTHOC}0.05") from None


def _read_chosen(method: Method, folder: RunFolder, checkpoint: str | None) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint's name and content; in place of a damaged best.ckpt that nobody asked for, last.ckpt with a line."""
    name = checkpoint or ("best" if method.monitor and folder.best.exists() else "last")
    path = folder.checkpoints / f"{name}.ckpt"
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        if checkpoint is not None or name == "last":
            raise
        if rank_and_world()[0] == 0:
            print(f"{error}. Until then last.ckpt is taken, not the best one by held-out loss", flush=True)
        return _read_chosen(method, folder, "last")
    check_owner(path, content, folder.checkpoint_owner(folder.stored_config(), method.name))
    return name, content


def choose_steps(method: Method, folder: RunFolder, count: int, weights: Weights) -> Weights:
    """Let the student take `count` steps.

    Args:
        method: The run's, with its student in place.
        folder: The run's, which may hold other students.
        count: The number of steps.
        weights: The run's own, of its checkpoint.

    Returns:
        Those that are in place then.

    Raises:
        ValueError: For a number that the run has no student for.
    """
    name = method.choose_steps(count, folder.path)
    return Weights(name) if name else weights


def samplers(method: Method, folder: RunFolder, counts: Sequence[int] = ()) -> dict[str, Sampler]:
    """Return what a run's pictures show, by title: its teacher, if it has one, and its student at each number of steps.

    Args:
        method: The run's, with its student in place.
        folder: The run's.
        counts: Numbers of steps; fewer than two stand for the student as it is.
    """
    teacher = {"teacher": method.teacher.sample} if method.teacher else {}
    if len(counts) < 2:
        return teacher | {"student": method.sample}

    def at(count: int) -> Sampler:
        def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
            method.choose_steps(count, folder.path)  # another column's were in place
            return method.sample(noise, labels)

        return sample

    # A title is broken at its spaces, but not between a number and its unit.
    return teacher | {f"student, {count}\N{NO-BREAK SPACE}NFE": at(count) for count in counts}
