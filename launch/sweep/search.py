"""A search over options (conf/sweep): trials that Optuna samples, what each minimises, and when one is given up."""

import math
import sys
from collections.abc import Sequence

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from launch.evaluate.measure import measures_nothing
from launch.run.folder import RunFolder
from launch.sweep.grid import IRRELEVANT, write_table
from launch.sweep.jobs import Job, Jobs, curve_on_the_way
from launch.sweep.study import Settings, alone, distributions, open_study, settled
from stillhouse.checks import check_counts
from stillhouse.files import write_file


def run_search(jobs: Jobs, overrides: Sequence[Override], n_trials: int, n_jobs: int, settings: Settings) -> None:
    """Bring the study in the search's folder to `n_trials` trials, complete or pruned, `n_jobs` at a time.

    Trials that were killed, or whose launcher was, come first, and resume. One that fails is stored as such, and another is
    sampled at the next call.

    Raises:
        ValueError: For impossible settings or another study.
        SystemExit: With code 1, after the table, where a trial failed.
    """
    check_counts(**{"hydra.sweeper.n_trials": n_trials, "hydra.sweeper.n_jobs": n_jobs})
    if jobs.config.plan:
        raise ValueError("plan=true is for runs: a search has none before it has trained others; leave sweep=NAME out")
    space = distributions(overrides)
    if not space:
        raise ValueError("a search needs an option to search over, such as 'method.lr=tag(log,interval(1e-5,1e-3))'")
    fixed = [one.input_line for one in overrides if not one.is_sweep_override()]
    _check_least(jobs.compose([*fixed, *(f"{key}={_text(_least(values))}" for key, values in space.items())]))
    with alone(jobs.folder):
        study = open_study(jobs.folder)
        searched = {key: str(value) for key, value in space.items()}
        chosen = dict(line.split("=", 1) for line in fixed if "=" in line and not IRRELEVANT.match(line))
        settled(study, searched | chosen)
        search = _Search(jobs, study, space, fixed, settings)
        try:
            search.run(n_trials, n_jobs)
        finally:
            search.write_table()
    if any(job.error for job in search.made.values()):
        sys.exit(1)


class _Search:
    def __init__(self, jobs: Jobs, study, space: dict, fixed: list[str], settings: Settings) -> None:
        self.jobs, self.study, self.space, self.fixed, self.settings = jobs, study, space, fixed, settings
        self.made: dict[int, Job] = {}  # of this call, by the trial's number

    def run(self, n_trials: int, n_jobs: int) -> None:
        killed, settled_before = [], 0
        for trial in self.study.get_trials():
            if trial.state.name == "RUNNING" and set(trial.params) == set(self.space):
                killed.append(trial.number)
            elif not trial.state.is_finished():  # killed while it was sampled
                self.study.tell(trial.number, state=_state("FAIL"))
            settled_before += trial.state.name in ("COMPLETE", "PRUNED")
        left = max(n_trials - settled_before, 0)
        while killed or left > 0:
            numbers = [killed.pop(0) for _ in range(min(n_jobs, len(killed)))]
            while len(numbers) < min(n_jobs, left):
                numbers.append(self._sample())
            left -= len(numbers)
            self._launch(numbers)
            if any(self.made[number].under_way for number in numbers):
                return

    def _sample(self) -> int:
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self.settings.sampler(number)
        return self.study.ask(self.space).number

    def _launch(self, numbers: list[int]) -> None:
        trials = self.study.get_trials()
        batch: dict[tuple, list[int]] = {}
        for number in numbers:
            self.made[number] = self._job(trials[number])
            # The same sample twice is one run, which two jobs at once would fight for.
            batch.setdefault(self.made[number].overrides, []).append(number)
        launched = [self.made[same[0]] for same in batch.values()]
        for job in launched:
            job.overrides = (*job.overrides, f"hydra.sweeper.trial={job.options['trial']}")
        self.jobs.launch(launched, first=numbers[0])
        for job, same in zip(launched, batch.values(), strict=True):
            if job.state == "complete" and job.value is None:  # its launcher died before it could hand on the answer
                job.value = last_monitored(job.folder, needed=False)
            for number in same:
                of_trial = self.made[number]
                of_trial.error, of_trial.value, of_trial.under_way = job.error, job.value, job.under_way
                self._store_outcome(number, job)

    def _store_outcome(self, number: int, job: Job) -> None:
        if job.under_way:  # the trial stays a running one, which the next call resumes
            return
        if job.state == "pruned":
            self.study.tell(number, state=_state("PRUNED"))
        elif job.state == "complete" and job.value is not None and math.isfinite(job.value):
            self.study.tell(number, job.value)
        else:
            self.study.tell(number, state=_state("FAIL"))

    def _job(self, trial) -> Job:
        sampled = {key: _text(trial.params[key]) for key in self.space}
        overrides = [*self.fixed, *(f"{key}={value}" for key, value in sampled.items())]
        return self.jobs.job(overrides, {"trial": str(trial.number)} | sampled)

    def write_table(self) -> None:
        """The table of all trials, with the best one, which best.yaml holds too."""
        trials = [trial for trial in self.study.get_trials() if set(trial.params) == set(self.space)]
        rows = []
        for trial in trials:
            job = self.made.get(trial.number) or self._job(trial)
            job.value = trial.value if trial.state.name == "COMPLETE" else None
            if trial.state.name == "FAIL" and job.error is None:
                job.error = "in an earlier call"
            rows.append(job)
        best = min((job for job in rows if job.value is not None), key=lambda job: job.value, default=None)
        closing = "no trial is complete yet"
        if best is not None:
            options = {key: value for key, value in best.options.items() if key != "trial"}
            summary = {"run": str(best.folder.path), "trial": int(best.options["trial"]), "value": best.value}
            text = yaml.safe_dump(summary | {"options": options}, sort_keys=False)
            write_file(self.jobs.folder / "best.yaml", text.encode())
            chosen = " ".join(f"{key}={value}" for key, value in options.items())
            closing = f"best: trial {summary['trial']} with {best.value:.4g}, {chosen}, in {best.folder.path}"
        write_table(rows, self.jobs.folder / "search.md", closing)


def _state(name: str):
    from optuna.trial import TrialState

    return TrialState[name]


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else repr(value)


def _least(distribution) -> str | int | float:
    """The least value, of choices the first."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _check_least(cfg: DictConfig) -> None:
    """Check that a run of the least values will leave a curve, as far as its config shows: each job checks its own once more.

    Raises:
        ValueError: As `check_measured` and `check_interval`.
    """
    check_measured(cfg)
    kimg, batch_size = cfg.method.get("kimg"), cfg.batch_size
    # What else is wrong with these the first job says.
    if all(type(n) in (int, float) and n > 0 for n in (kimg, batch_size, cfg.callbacks.metrics.get("every_kimg"))):
        check_interval(cfg, math.ceil(1000 * kimg / batch_size))


def check_measured(cfg: DictConfig) -> None:
    """Check, before training, that a run of a search will leave a curve.

    Raises:
        ValueError: Before training, for a run of a search that would leave no curve.
    """
    missing = [f"{key}=null" for key in ("logger.csv", "callbacks.metrics") if not _selected(cfg, key)]
    if measures_nothing(cfg.evaluation):
        missing = ["evaluation=none"]
    if missing:
        raise ValueError(f"a search minimises what a run's curve ends at, and with {missing[0]} there is no curve")


def check_interval(cfg: DictConfig, steps: int) -> None:
    """Check that a run of a search is measured before its end, too: a curve takes two measurements.

    Args:
        cfg: Of the run.
        steps: Of its training; where that has stages, of the last part.

    Raises:
        ValueError: Where the interval is too long for the run.
    """
    every = cfg.callbacks.metrics.every_kimg
    if (steps - 1) * cfg.batch_size < round(1000 * every):
        raise ValueError(
            f"a search minimises what a run's curve ends at, and a training of {steps * cfg.batch_size / 1000:g} kimg, measured "
            f"every {every:g} kimg, is measured at its end alone; lower evaluation.training.every_kimg"
        )


def check_multirun(hydra_config: DictConfig) -> None:
    """Check that a command with a search has -m, without which Hydra would ignore it.

    The jobs of a search, and the processes that they start without -m, are trials.

    Raises:
        ValueError: For a search without -m.
    """
    if "n_trials" in hydra_config.sweeper and hydra_config.sweeper.trial is None:
        name = hydra_config.runtime.choices.get("sweep")
        chosen = "hydra/sweeper=search" if name in (None, "grid") else f"sweep={name}"
        raise ValueError(f"without -m this is one run, no search: add -m, or leave {chosen} out")


def last_monitored(folder: RunFolder, needed: bool) -> float | None:
    """The last value of `curve_on_the_way`; None without a curve. It raises as that does."""
    curve = curve_on_the_way(folder, needed)
    return curve.values[-1] if curve else None


def _selected(cfg: DictConfig, key: str) -> bool:
    group, name = key.split(".")
    return bool(cfg[group]) and cfg[group].get(name) is not None
