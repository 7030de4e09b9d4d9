"""Methods, data sets, families of teachers: each family meets all others here; all three meet in results/support.json."""

import json
import logging

import pytest
from hydra import initialize_config_dir
from published_files import PUBLISHED
from support_matrix import FAMILIES, METHODS, ROOT, TRAINED, Case, cases, covering, planned, published, run

from launch.run.names import register_resolvers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    register_resolvers()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield tmp_path_factory.mktemp("support")


QUICK = ("pretrain", "diff_instruct", "sfd")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=() if case.method in QUICK else pytest.mark.slow,
            id=f"{case.data}-{case.method.replace(' ', '_')}-{case.family}",
        )
        for case in covering()
    ],
)
def test_it_is_planned_trains_samples_and_costs_what_it_says(case, folder):
    with published(case.data, folder / case.data) as options:
        assert "of the student" in planned(case, options)
        run(case, options)


@pytest.mark.slow  # half a second a case
@pytest.mark.parametrize("data", PUBLISHED)
def test_every_case_is_planned(data, folder):
    """All train, as the recorded matrix says, so plan may refuse none."""
    refused = {}
    with published(data, folder / data) as options:
        for case in cases():
            if case.data == data:
                try:
                    planned(case, options)
                except Exception as error:
                    refused[case] = str(error)
    assert not refused


def test_every_family_meets_every_method_and_every_data_set():
    def pairs(some: list[Case]) -> set[tuple[str, str]]:
        return {pair for c in some for pair in ((c.method, c.family), (c.data, c.family))}

    assert pairs(covering()) == pairs(cases())
    assert set(covering()) <= set(cases())
    assert len(covering()) == len(METHODS) * len(FAMILIES)


def test_the_recorded_matrix_is_of_all_cases_and_all_trained():
    outcomes = json.loads((ROOT / "results/support.json").read_text())["outcomes"]
    found = {
        (m, d, f): outcome for m, row in outcomes.items() for d, cell in row.items() for f, outcome in cell.items()
    }
    assert set(found) == {(case.method, case.data, case.family) for case in cases()}
    assert set(found.values()) == {TRAINED}
