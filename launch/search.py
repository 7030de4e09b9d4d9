"""What a search over options (conf/sweep) minimises."""

from hydra.types import RunMode
from omegaconf import DictConfig

from launch.folder import RunFolder
from metrics.curve_files import read_curve


def searching(hydra_config: DictConfig) -> bool:
    """Whether a sweeper that wants a value of each job is at work; Hydra's own does not."""
    return hydra_config.mode == RunMode.MULTIRUN and not hydra_config.sweeper._target_.endswith(".BasicSweeper")


def check_measured(cfg: DictConfig) -> None:
    """Errors: ValueError, before training, for a run of a search that would leave no curve."""
    missing = [f"{key}=null" for key in ("logger.csv", "callbacks.metrics") if not _selected(cfg, key)]
    if missing:
        raise ValueError(f"a search minimises what a run's curve ends at, and with {missing[0]} there is no curve")


def last_monitored(folder: RunFolder, needed: bool) -> float | None:
    """The last value of a run's curve, of the first average or the weights as trained; None for a run without a curve.

    It is of the monitoring seeds, by which runs may be chosen, never of those of the final evaluation.

    Errors: with `needed`, those of `read_curve`.
    """
    try:
        return read_curve(folder.path, folder.name, seed=0).values[-1]
    except (OSError, ValueError):
        if needed:
            raise
        return None


def _selected(cfg: DictConfig, key: str) -> bool:
    group, name = key.split(".")
    return bool(cfg[group]) and cfg[group].get(name) is not None
