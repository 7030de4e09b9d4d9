"""Sizes that fit into no memory are refused before anything is allocated, and the option is named."""

import pytest
from end_to_end_tools import train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method.pairs=100000000000000", ["method.pairs=100000000000000 (lower it)", "1.6e+06 GB of memory"]),
        ("method.held_out=100000000000000", ["method.held_out=100000000000000 (lower it)", "GB of memory"]),
        ("batch_size=100000000000", ["batch_size=100000000000 (lower it)", "5.12e+04 GB of memory"]),
        ("teacher.steps=100000000000", ["100000000000 solver steps of teacher digits (lower them)", "GB of memory"]),
        ("method=progressive method.start_steps=1099511627776", ["1099511627776 solver steps of teacher digits", "GB"]),
        ("method=disback method.nodes=1000000000000", ["method.nodes=1000000000000", "take fewer nodes"]),
        ("method.pairs=1e14", ["pairs"]),
    ],
)
def test_sizes_that_fit_into_no_memory(tmp_path, options, message):
    train(tmp_path, *options.split()).refused(*message)
