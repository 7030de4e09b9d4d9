"""What a command line that Hydra can't compose is told, as `python train.py` and `python evaluate.py` say it in one line."""

import sys

import pytest
from end_to_end_tools import ROOT
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from launch import command_line
from launch.command_line import choose_task, explained, nearest
from launch.errors import EXPECTED
from launch.run.names import register_resolvers


def test_the_nearest_options():
    names = ["method", "method.loss", "method.lr", "teacher.steps", "method.steps", "trainer.devices"]
    assert nearest("method.lss", names) == ["method.loss"]
    assert nearest("steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("mehtod.steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("nothing", names) == []


@pytest.fixture(scope="module")
def composed():
    """What messages look names up in, by program and choices: composed once for all of them."""
    return {}


@pytest.fixture(autouse=True)
def _conf(composed, monkeypatch):
    compose = command_line._compose

    def once(overrides):
        key = (command_line._program(), *overrides)
        if key not in composed:
            composed[key] = compose(overrides)
        return composed[key]

    monkeypatch.setattr(command_line, "_compose", once)
    monkeypatch.setattr(sys, "argv", [])
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def told(program, options):
    """The line about a command, whose errors are those of the loader that hydra.main calls."""
    sys.argv = [program, *options.split()]
    if program == "evaluate.py":
        choose_task()
    config = program.replace("train", "config").removesuffix(".py")
    given = [option for option in sys.argv[1:] if option != "-m"]
    with pytest.raises(EXPECTED) as caught:
        composed = GlobalHydra.instance().config_loader().load_configuration(config, given, command_line.RunMode.RUN)
        _ = composed.hydra.run.dir  # where hydra.main goes next
    line = explained(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        # What conf/ does not have: the nearest that it has.
        ("trainer.devces=2", "there is no option trainer.devces; did you mean trainer.devices?", "own: +trainer.devces=...)"),
        ("lr=1", "there is no option lr; did you mean method.lr?", ""),
        ("methd=sfd", "there is no option methd; did you mean method?", ""),
        ("~method.parrs", "there is no option method.parrs; did you mean method.pairs?", ""),
        ("zzz=1", "there is no option zzz; --cfg job shows all options", ""),
        ("-m method.los=l1", "there is no option method.los; did you mean method.loss?", ""),
        ("method=denoising_studnet", "method=denoising_studnet is not among conf/method; did you mean denoising_student?", ""),
        ("logger=none", "logger=none is not among conf/logger; choose logger=NAME: csv, default, wandb, wandb_offline", ""),
        ("teacher=none teacher.weights=a", "there is no option teacher.weights without a teacher: say teacher=NAME", ""),
        # What a run can't do without.
        ("data=null", "data=null: data can't be left out; choose data=NAME: celeba64, checkerboard, cifar10, digits, ", ""),
        ("~name", "~name: name can't be left out", ""),
        ("logger=null", "logger=null: logger can't be left out; choose logger=NAME: csv, default", ""),
        ("recipe=null", "recipe=null: recipe can't be null; say ~recipe to leave it out", ""),
        # What can't be read.
        ("data", "'data' can't be read: ", "say KEY=VALUE"),
        ("method.loss=[a", "'method.loss=[a' can't be read: ", "say KEY=VALUE"),
        ("method.lr=1,2", "Ambiguous value for argument 'method.lr=1,2' ", "add --multirun to your command line"),
    ],
)  # fmt: skip
def test_what_train_does_not_take(options, begin, end):
    line = told("train.py", options)
    assert line.startswith(begin)
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("teacher=digist", "teacher=digist is not among conf/teacher; did you mean digits"),
        ("num_sample=3", "there is no option num_sample; did you mean num_samples"),
        ("teacher=digits weigths=raw", "there is no option weigths"),
        ("task=expert run=runs/a", "task=expert is not among conf/task; did you mean export"),
        ("run=runs/a +evaluation=pixels", "evaluation is a choice that the config has: say evaluation=NAME, without +"),
        # What another task has.
        ("run=runs/a teacher=digits", "there is no option run of task=teacher; it is of task=export, task=report, task=runs"),
        ("run=runs/a solver=euler", "there is no option solver of task=runs; it is of task=teacher"),
        (
            "run=runs/a data=cifar10",
            "there is no option data of task=runs; it is of task=flows, task=self_test, task=teacher",
        ),
        (
            "task=self_test teacher=digits num_samples=20",
            "there is no option num_samples of task=self_test; it is of task=flows",
        ),
        # What is a task.
        ("run=runs/a check=true", "check is a task of its own: python evaluate.py task=self_test teacher=NAME"),
        ("run=runs/a export=b", "export is a task of its own: python evaluate.py task=export run=runs/NAME target="),
        ("run=runs/* report=r.html", "report is a task of its own: python evaluate.py task=report 'run=[runs/*]'"),
    ],
)  # fmt: skip
def test_what_evaluate_does_not_take(options, message):
    assert told("evaluate.py", options).startswith(message)


def test_a_folder_that_can_not_be_made(tmp_path):
    """As on a disk that takes nothing: Hydra makes the job's folder before the job begins."""
    line = explained(FileNotFoundError(2, "No such file or directory", f"{tmp_path}/run"))
    assert line.startswith(f"the folder {tmp_path}/run can't be made (No such file or directory): move away what is")
    assert line.endswith("or choose another name=...")
