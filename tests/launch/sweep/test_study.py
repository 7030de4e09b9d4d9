"""A search's study: what is drawn from, how trials are drawn and given up, and whose it is."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from launch.sweep.study import Settings, alone, distributions, open_study, settled

SETTINGS = {"seed": 0, "n_startup_trials": 3, "pruner": None, "pruner_warmup": 0.25}


def space(*options):
    return distributions(OverridesParser.create().parse_overrides(list(options)))


def test_hydras_grammar_becomes_optunas_distributions():
    found = space(
        "a=interval(0.1,2)",
        "b=tag(log,interval(1e-5,1e-3))",
        "c=int(interval(1,8))",
        "d=tag(log,int(interval(1,8)))",
        "e=range(2,9,2)",
        "f=range(0,1,0.25)",
        "+g=choice(0.5,'a b',true)",
        "h=null,2,null",
        "i=3",
    )
    assert found == {
        "a": FloatDistribution(0.1, 2),
        "b": FloatDistribution(1e-5, 1e-3, log=True),
        "c": IntDistribution(1, 8),
        "d": IntDistribution(1, 8, log=True),
        "e": IntDistribution(2, 8, step=2),
        "f": FloatDistribution(0.0, 0.75, step=0.25),
        "+g": CategoricalDistribution(("0.5", r"a\ b", "True")),
        "h": CategoricalDistribution(("null", "2")),
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("a=interval(2,1)", r"a=interval\(2,1\): .*low"),
        ("a=tag(log,interval(0,1))", r"a=tag\(log,interval\(0,1\)\): .*log"),
        ("a=tag(loq,interval(1,2))", "the tag loq means nothing here; there is log"),
        ("a=range(5,1)", "this range is empty"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        space(option)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pruner": "hyperband"}, "hydra.sweeper.pruner=hyperband is unknown; choose median or null"),
        ({"pruner_warmup": 2}, "pruner_warmup=2 must be a fraction"),
        ({"seed": -1}, "hydra.sweeper.seed must be an integer of at least 0"),
        ({"n_startup_trials": 1.5}, "n_startup_trials must be an integer"),
    ],
)
def test_impossible_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Settings(**SETTINGS | changed)


def drawn(folder, calls):
    """The parameters of as many trials as `calls` say, the study opened anew for each call."""
    settings, ranges = Settings(**SETTINGS), space("a=interval(0,1)", "b=choice(x,y)")
    for count in calls:
        study = open_study(folder)
        for _ in range(count):
            study.sampler = settings.sampler(len(study.trials))
            trial = study.ask(ranges)
            study.tell(trial, trial.params["a"] + (trial.params["b"] == "x"))
    return [trial.params for trial in open_study(folder).trials]


def test_a_study_that_goes_on_draws_what_it_would_have_drawn_at_once(tmp_path):
    at_once, in_parts = drawn(tmp_path / "at_once", [7]), drawn(tmp_path / "in_parts", [2, 3, 2])
    assert at_once == in_parts
    assert len({params["a"] for params in at_once}) == 7


def test_the_pruner_waits_for_complete_trials_and_for_its_share_of_the_images(tmp_path):
    """Two perfect trials; of a third, which is worse, images at which it is given up."""
    settings = Settings(**SETTINGS | {"pruner": "median", "n_startup_trials": 2, "pruner_warmup": 0.5})
    study = open_study(tmp_path, settings.pruner_for(images=400))

    def given_up(value):
        trial, hopeless = study.ask(), []
        for nimg in (100, 200, 300, 400):
            trial.report(value, nimg)
            hopeless += [nimg] if trial.should_prune() else []
        study.tell(trial, value)
        return hopeless

    assert [given_up(value) for value in (1.0, 5.0, 2.0, 4.0)] == [[], [], [], [200, 300, 400]]


def test_another_search_in_its_folder_is_refused(tmp_path):
    settled(open_study(tmp_path), {"method.lr": "x", "seed": "0"})
    settled(open_study(tmp_path), {"method.lr": "x", "seed": "0"})
    with pytest.raises(ValueError, match=r"begun with seed=0, but this command has seed=1; give it another folder"):
        settled(open_study(tmp_path), {"method.lr": "x", "seed": "1"})


def test_a_damaged_study_is_named(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match=r"study\.db is no study that this Optuna reads"):
        open_study(tmp_path)


def test_one_search_at_a_time(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match="another process runs this search"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
