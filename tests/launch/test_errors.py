import re
import sys

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch.errors import JobFailed, JobInUse, one_line, reported
from launch.run.folder import RunInUse


def strict(size: int) -> int:
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    return size


def test_expected_errors_become_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as exit_code, reported("runs/a"):
        raise ValueError("loss is unknown;\n choose l1")
    assert exit_code.value.code == 1
    assert capsys.readouterr().err == "error: runs/a: loss is unknown; choose l1\n"


def test_a_sweep_goes_on_after_the_message(capsys):
    with pytest.raises(JobFailed, match="no file"), reported("runs/b", sweep=True):
        raise FileNotFoundError("no file")
    assert capsys.readouterr().err == "error: runs/b: no file\n"
    with pytest.raises(JobInUse), reported("runs/b", sweep=True):  # a search keeps such a trial
        raise RunInUse("another process trains this run")


def test_beside_other_jobs_the_message_begins_a_line_of_its_own(capsys):
    print("another job's bar", end="", file=sys.stderr)
    with pytest.raises(JobFailed), reported("runs/b", sweep=True, shared=True):
        raise FileNotFoundError("no file")
    assert capsys.readouterr().err.splitlines() == ["another job's bar", "error: runs/b: no file"]


def test_errors_of_lightnings_and_wandbs_own_kinds_are_expected(capsys):
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from wandb.errors import UsageError

    for error in (MisconfigurationException("no gpu"), UsageError("no key")):
        with pytest.raises(SystemExit), reported("runs/a"):
            raise error
    assert capsys.readouterr().err == "error: runs/a: no gpu\nerror: runs/a: no key\n"


def test_what_a_collective_says_of_a_process_that_has_gone_is_one_line(capsys):
    with pytest.raises(SystemExit), reported("runs/a"):
        raise RuntimeError("[pair.cc:534] gloo: Connection closed by peer [127.0.0.1]:1234: This is an explanation\n")
    assert capsys.readouterr().err.startswith(
        "error: runs/a: another process of this run has ended ([pair.cc:534] gloo"
    )


def test_programming_errors_keep_their_traceback():
    with pytest.raises(KeyError), reported("runs/c"):
        {}["x"]


def test_in_a_sweep_each_jobs_traceback_is_shown(capsys):
    with pytest.raises(KeyError), reported("runs/c", sweep=True):
        {}["x"]
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="shown"), reported("runs/d"):
        raise ValueError("shown")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"size": 0}, "method: size must be positive, got 0"),
        ({"size": 1, "siez": 2}, r"method: .*unexpected keyword argument 'siez'"),
        ({"size": "x"}, r"method: an option has the wrong type \('<' not supported between"),
    ],
)
def test_what_a_constructor_raised_is_shown_with_its_key(node, message):
    config = OmegaConf.create({"method": {"_target_": f"{__name__}.strict", **node}})
    with pytest.raises(Exception) as caught:  # noqa: PT011
        instantiate(config.method)
    assert re.search(message, one_line(caught.value))
    assert "\n" not in one_line(caught.value)


def test_the_file_of_a_system_error_is_named(tmp_path):
    missing = tmp_path / "nothing.txt"
    with pytest.raises(OSError, match="nothing.txt") as caught:
        missing.read_text()
    caught.value.strerror = None
    assert str(missing) in one_line(caught.value)
