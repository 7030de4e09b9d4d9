"""What runs the jobs of `python train.py -m`: Hydra takes sweepers from this folder alone."""

from collections.abc import Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Stillhouse(Sweeper):
    """What both have in common: parameters from the config, which the command line overrides."""

    def __init__(self, params: Mapping[str, Any] | None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from launch.errors import reported
        from launch.sweep.jobs import Jobs

        with reported("sweep"):
            self.jobs = Jobs(hydra_context, task_function, config)

    def overrides(self, arguments: list[str]) -> list[Override]:
        parser = OverridesParser.create(config_loader=self.jobs.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        named = {override.key_or_group for override in given}
        configured = parser.parse_overrides([f"{key}={value}" for key, value in self.params.items()])
        return [*(one for one in configured if one.key_or_group not in named), *given]


class Grid(_Stillhouse):
    """Every combination of the values that the options list, then a table; see `launch.sweep.grid`."""

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        super().__init__(params)

    def sweep(self, arguments: list[str]) -> None:
        from launch.errors import reported
        from launch.sweep.grid import check_values, run_grid

        overrides = self.overrides(arguments)
        with reported("sweep"):
            check_values(overrides)
            (jobs,) = BasicSweeper.split_arguments(overrides, None)
            run_grid(self.jobs, jobs, arguments)


class Search(_Stillhouse):
    """Trials that Optuna draws, one batch after the other; see `launch.sweep.search`. trial: set in each job, its number."""

    def __init__(
        self, params: Mapping[str, Any], n_trials: int, n_jobs: int, trial: int | None = None, **settings: Any
    ) -> None:
        super().__init__(params)
        self.n_trials, self.n_jobs, self.settings = n_trials, n_jobs, settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from launch.errors import reported
        from launch.sweep.jobs import check_extra

        with reported("search"):
            check_extra("optuna", "optuna", f"sweep={config.hydra.runtime.choices.get('sweep')}")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        from launch.errors import reported
        from launch.sweep.search import run_search
        from launch.sweep.study import Settings

        with reported("search"):
            run_search(self.jobs, self.overrides(arguments), self.n_trials, self.n_jobs, Settings(**self.settings))
