"""Measure runs or a teacher: samples of fixed seeds -> metrics, a table, JSON and pictures; and what is made of them.

python evaluate.py run=runs/NAME; python evaluate.py 'run=[runs/A,runs/B*]' 'steps=[1,2,4]'; python evaluate.py teacher=digits
python evaluate.py --help shows the tasks; each has its options in conf/task/NAME.yaml and its code in launch/evaluate/NAME.py.
"""

import hydra
from omegaconf import DictConfig

from launch.command_line import choose_task, run
from launch.run.names import register_resolvers
from launch.signals import stoppable


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from launch.evaluate.tasks import run_task  # imports torch, so that --help is quick without it

    run_task(cfg)


if __name__ == "__main__":
    register_resolvers()
    choose_task()
    with stoppable("evaluate"):
        run(main)
