"""Train a method: compose -> build -> fit -> final evaluation. The same command again resumes.

python train.py method=denoising_student data=digits seed=0
"""

import os
from contextlib import nullcontext

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.command_line import check_choices, chosen_by_itself, run
from launch.run.names import register_resolvers
from launch.signals import stoppable

# Before torch is loaded: its C++ side warns of what launch/run/processes.py does on purpose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def train(cfg: DictConfig, hydra_config: DictConfig) -> float | None:
    """The last value of the run's curve, which a search minimises; None where there is no curve or the run was pruned."""
    # Heavy imports wait until here, so that --help and TAB completion are quick.
    from launch.evaluate.measure import check_data, checked, leave_out_measurement, needs_images
    from launch.options import check_run
    from launch.process_environment import is_rank_zero
    from launch.quiet import quiet
    from launch.run.build import build, build_seeded, build_trainer, check_fit
    from launch.run.final import finish
    from launch.run.folder import RunFolder
    from launch.run.plan import plan
    from launch.run.processes import one_job
    from launch.run.remote_files import fetch
    from launch.run.stages import build_stages, fit_stages
    from launch.run.teachers import expand_teachers
    from launch.sweep.pruning import Pruned, trial, watch
    from launch.sweep.search import check_measured, last_monitored

    quiet()
    check_choices()
    if "sweep" in cfg:
        raise ValueError("sweep=wandb is for W&B: say `wandb sweep conf/sweep/wandb.yaml`, then `wandb agent ...`")
    folder, search = RunFolder(cfg.folder), trial(hydra_config) is not None
    expand_teachers(cfg)
    leave_out_measurement(cfg)
    check_run(cfg)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for option in ("folder", "download", "plan"):  # a run may be moved, and none of these changes it
        del config[option]
    folder.check(config)
    if (recipe := chosen_by_itself("recipe")) and is_rank_zero():
        print(f"recipe={recipe}, the published settings of this method and data (conf/recipe)", flush=True)
    if (teacher := chosen_by_itself("teacher")) not in (None, "none") and is_rank_zero():
        print(
            f"teacher={teacher}, by the data; teacher=NAME (conf/teacher) or teacher=runs/NAME chooses another",
            flush=True,
        )
    if cfg.plan:
        print(plan(cfg))
        return None
    if folder.complete():
        print(f"{folder.path} is complete:\n\n{folder.report()}\n\nChoose another name=... or seed=... to train again.")
        return last_monitored(folder, search)
    if search:
        check_measured(cfg)
        if folder.pruned.exists():
            return None
    if cfg.download:
        fetch(config)
    data = build(cfg.data)
    method = build_seeded(cfg.method, cfg.seed)
    # Whatever is wrong shows now, before anything is written, and not after training.
    check_fit(method, data)
    training, evaluation = method.training_data(data), checked(build(cfg.evaluation), data)
    if training is data or needs_images(evaluation):
        data.check_source()
    stages = build_stages(cfg, method, data, folder)
    trainer = build_trainer(cfg, method, folder)
    if search:
        watch(trainer, folder, hydra_config)
    with (
        one_job(*(stage.trainer for stage in stages), trainer),
        folder.held(config) if is_rank_zero() else nullcontext(),
    ):
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
        check_data(evaluation, data)
        fit_stages(stages, method, folder)
        try:
            trainer.fit(method, training, ckpt_path=folder.resume())
        except Pruned as reason:
            print(f"{folder.path} {reason}", flush=True)
            return None
        finish(method, data, training, evaluation, folder, trainer)
    return last_monitored(folder, search)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from launch.errors import reported
    from launch.sweep.launchers import at_once, placed

    hydra_config = HydraConfig.get()
    cfg.folder = os.path.relpath(hydra_config.runtime.output_dir)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    with (
        reported(cfg.folder, sweep=sweep, shared=at_once(hydra_config.launcher)),
        placed(cfg.trainer, hydra_config.launcher),
        stoppable(cfg.folder),
    ):
        return train(cfg, hydra_config)


if __name__ == "__main__":
    register_resolvers()
    with stoppable("train"):
        run(main)
