"""A search's study in Optuna: SQLite in the search's folder, and the callback by which each of its jobs reports to it."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig

from callbacks import GenerativeMetrics
from callbacks.components.intervals import interval_reached, is_last_step
from launch.run.folder import RunFolder
from stillhouse.analysis.curves import curve_column_names
from stillhouse.checks import check_counts
from stillhouse.file_locks import hold_lock
from stillhouse.files import write_json
from stillhouse.ranks import run_on_rank_zero

if TYPE_CHECKING:
    import optuna

NAME = "search"


@dataclass(frozen=True)
class Settings:
    """How trials are sampled and given up; conf/hydra/sweeper/search.yaml explains each.

    Raises:
        ValueError: For an impossible one.
    """

    seed: int
    n_startup_trials: int
    pruner: str | None
    pruner_warmup: float

    def __post_init__(self) -> None:
        check_counts(0, **{"hydra.sweeper.seed": self.seed, "hydra.sweeper.n_startup_trials": self.n_startup_trials})
        if self.pruner not in (None, "median"):
            raise ValueError(f"hydra.sweeper.pruner={self.pruner} is unknown; choose median or null")
        if not 0 <= self.pruner_warmup <= 1:
            raise ValueError(f"hydra.sweeper.pruner_warmup={self.pruner_warmup} must be a fraction, from 0 to 1")

    def pruner_for(self, images: int) -> "optuna.pruners.BasePruner":
        """Return the pruner for runs of that many images."""
        import optuna

        if self.pruner is None:
            return optuna.pruners.NopPruner()
        return optuna.pruners.MedianPruner(self.n_startup_trials, n_warmup_steps=round(self.pruner_warmup * images))

    def sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """Return the sampler of trial `number`: one for each, so that a study that goes on samples as it would have at once."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=self.seed + number, n_startup_trials=self.n_startup_trials, constant_liar=True
            )


def open_study(folder: Path, pruner: "optuna.pruners.BasePruner | None" = None) -> "optuna.Study":
    """The study in `folder`/study.db, made where there is none.

    Raises:
        ValueError: For a file that holds something else.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "study.db"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}, skip_compatibility_check=False
        )
        return optuna.create_study(
            storage=storage, study_name=NAME, direction="minimize", load_if_exists=True, pruner=pruner
        )
    except (sqlalchemy.exc.DatabaseError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no study that this Optuna reads ({reason}); move it away or restore it") from error


def distributions(overrides: Iterable[Override]) -> dict[str, Any]:
    """{key: Optuna's distribution} of the overrides that are sweeps, in Hydra's grammar.

    interval(a, b), int(interval(a, b)) and, behind tag(log, ...), their logarithm; range(a, b, step); choice(...) or a list.

    Raises:
        ValueError: For anything else.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made = {}
    for override in overrides:
        if not override.is_sweep_override():
            continue
        key, value = override.get_key_element(), override.value()
        unknown = getattr(value, "tags", set()) - {"log"}
        try:
            if unknown:
                raise ValueError(f"the tag {', '.join(sorted(unknown))} means nothing here; there is log")
            if isinstance(value, IntervalSweep):
                whole = isinstance(value.start, int) and isinstance(value.end, int)
                kind = IntDistribution if whole else FloatDistribution
                made[key] = kind(value.start, value.end, log="log" in value.tags)
            elif isinstance(value, RangeSweep) and not value.shuffle and not value.tags:
                made[key] = _ordered(list(override.sweep_iterator()), value.step)
            else:
                made[key] = CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{override.input_line}: {error}") from error
    return made


def _ordered(values: list, step: float) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    if not values:
        raise ValueError("this range is empty")
    kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
    return kind(min(values), max(values), step=abs(step))


def settled(study: "optuna.Study", identity: dict[str, Any]) -> None:
    """Store what the study searches over, the first time, and compare it with that later.

    Raises:
        ValueError: Where the study was begun with something else.
    """
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", identity)
    elif stored != identity:
        was, now = (
            ", ".join(f"{k}={v}" for k, v in one.items() if other.get(k) != v) or "no such option"
            for one, other in ((stored, identity), (identity, stored))
        )
        raise ValueError(
            f"this search was begun with {was}, but this command has {now}; give it another folder by hydra.sweep.dir=..."
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        ValueError: Where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = ValueError(f"{folder}: another process runs this search; wait for it, or choose another hydra.sweep.dir")
    with hold_lock(folder / "lock", refusal, "choose another hydra.sweep.dir"):
        yield


class Pruned(Exception):
    """The run ends here, as by a kill: by hand it goes on from its last checkpoint."""


class Pruning(pl.Callback):
    """Reports to trial `number` of the study in `folder`; raises `Pruned` on every rank where that says so.

    Must come after GenerativeMetrics and before the checkpoints. Leaves pruned.json in the run folder.
    """

    def __init__(self, run: RunFolder, folder: Path, number: int, settings: Settings) -> None:
        self.run, self.folder, self.number, self.settings = run, folder, number, settings

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.every_kimg = next(c.every_kimg for c in trainer.callbacks if isinstance(c, GenerativeMetrics))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not interval_reached(trainer, pl_module, self.every_kimg):
            return
        column, *_ = curve_column_names(trainer.callback_metrics)
        value, nimg = float(trainer.callback_metrics[column]), pl_module.nimg
        total = trainer.max_steps * pl_module.batch_size
        if run_on_rank_zero(lambda: self._hopeless(value, nimg, total)) and not is_last_step(trainer):
            if trainer.is_global_zero:
                reached = {"nimg": nimg, column: value, "trial": self.number}
                write_json(self.run.pruned, reached)
            raise Pruned(f"pruned after {nimg / 1000:g} of {total / 1000:g} kimg, at {column} {value:.4g}")

    def _hopeless(self, value: float, nimg: int, total: int) -> bool:
        from optuna.trial import Trial

        study = open_study(self.folder, self.settings.pruner_for(total))
        stored = study.get_trials()[self.number]
        trial = Trial(study, stored._trial_id)
        if nimg not in stored.intermediate_values:  # a resumed run measures again
            trial.report(value, nimg)
        return trial.should_prune()


def report_to_study(trainer: pl.Trainer, run: RunFolder, hydra_config: DictConfig) -> None:
    """Let the run's trainer report to the study of the search that this job is a trial of."""
    sweeper = hydra_config.sweeper
    settings = Settings(**{key: sweeper[key] for key in Settings.__dataclass_fields__})
    pruning = Pruning(run, Path(hydra_config.sweep.dir), sweeper.trial, settings)
    last = next(
        i for i, c in enumerate([*trainer.callbacks, None]) if c is None or isinstance(c, pl.callbacks.Checkpoint)
    )
    trainer.callbacks.insert(last, pruning)


def trial_number(hydra_config: DictConfig) -> int | None:
    """Return the number of the trial that this job is; None outside of a search, also for a trial's run trained by hand."""
    return hydra_config.sweeper.get("trial")
