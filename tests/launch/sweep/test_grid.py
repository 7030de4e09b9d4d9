"""What a sweep over every combination refuses before a job begins."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.sweep.grid import check_values


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
