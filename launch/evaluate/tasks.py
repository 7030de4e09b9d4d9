"""One task of evaluate.py: its options checked, then carried out."""

from importlib import import_module

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from launch.command_line import check_choices
from launch.errors import reported
from launch.options import check_options
from launch.run.teachers import expand_guide


def run_task(cfg: DictConfig) -> None:
    """Carry out the task that the command chose.

    Args:
        cfg: The composed config, whose options are those of conf/task/NAME.yaml.

    Raises:
        SystemExit: With code 1, after one line, for bad options or input.
    """
    with reported("evaluate"):
        check_choices()
        name = HydraConfig.get().runtime.choices["task"]
        task = import_module(f"launch.evaluate.{name}")
        expand_guide(cfg)
        if not cfg.get("teacher", True):  # none was named, and nothing of one
            with open_dict(cfg):
                del cfg.teacher
        check_options(cfg, task.Options, f"task={name}")
        task.main(cfg)
