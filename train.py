"""Train a method: compose -> build -> fit -> final evaluation. The same command again resumes.

python train.py method=denoising_student data=digits seed=0
"""

import os

import hydra
from omegaconf import DictConfig

from launch.command_line import run
from launch.run.names import register_resolvers
from launch.signals import stoppable

# Before torch is loaded: its C++ side warns of what launch/run/processes.py does on purpose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from launch.run.train import run_job  # imports torch, so that --help and TAB completion are quick without it

    return run_job(cfg)


if __name__ == "__main__":
    register_resolvers()
    with stoppable("train"):
        run(main)
