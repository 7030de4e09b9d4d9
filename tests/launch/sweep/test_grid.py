"""What a sweep over every combination refuses before a job begins."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.run.folder import RunFolder
from launch.sweep.grid import check_values, run_grid
from launch.sweep.jobs import Job


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.lr=1e-3,2e-3,0.001", "method.lr=1e-3,2e-3,0.001: a value is given twice, 0.001"),
        ("+method=choice(sfd,sid,sfd)", "a value is given twice, sfd"),
        ("method.lr=tag(log,interval(1e-5,1e-3))", "an interval is for a search: .* or list values, as method.lr=A,B"),
    ],
)
def test_a_repeated_value_and_an_interval_are_refused(option, message):
    given = OverridesParser.create().parse_overrides(
        ["seed=0,1,2", "a=range(0,3)", "b=true,1,1.0,'1'", "c=[1,1]", option]
    )
    check_values(given[:-1])
    with pytest.raises(ValueError, match=message):
        check_values(given)


def test_two_jobs_in_one_folder_are_refused():
    """Of the command `name=a seed=0,1`."""
    jobs = SimpleNamespace(
        job=lambda overrides, options: Job(overrides, options, RunFolder("runs/a")), folder=Path("runs")
    )
    with pytest.raises(
        ValueError, match=r"two jobs would have the folder runs/a: .* lack seed; .* 'name=NAME-\$\{seed\}'$"
    ):
        run_grid(jobs, [("name=a", "seed=0"), ("name=a", "seed=1")], [])
