"""What a search minimises, and what it refuses before a trial trains."""

from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from launch.errors import JobFailed, JobInUse
from launch.run.folder import RunFolder
from launch.sweep.jobs import Job, Jobs
from launch.sweep.search import check_interval, check_measured, check_multirun, last_monitored, run_search
from launch.sweep.study import Settings, open_study, trial_number
from stillhouse.metrics.records import save_records

HEAD = "step,nimg,progress/student_updates,speed/training_seconds,loss/student,fid_digits_20/raw\n"


def test_it_is_the_last_value_of_the_curve(tmp_path):
    rows = "0,10,,,3,\n1,20,2,0.1,,9\n3,40,4,0.2,,4\n5,60,6,0.3,,5.5\n6,70,,,2,\n"
    (tmp_path / "metrics.csv").write_text(HEAD + rows)
    assert last_monitored(RunFolder(tmp_path), needed=True) == 5.5


@pytest.mark.parametrize("content", [None, "", "step,loss/student\n0,3\n", HEAD + "1,20,2,0.1,,9\n"])
def test_a_run_without_a_curve_has_none_and_fails_in_a_search_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    assert last_monitored(RunFolder(tmp_path), needed=False) is None
    with pytest.raises((FileNotFoundError, ValueError), match=r"metrics\.csv"):
        last_monitored(RunFolder(tmp_path), needed=True)


@pytest.mark.parametrize(
    ("sweeper", "expected"), [({"params": None}, None), ({"trial": None}, None), ({"trial": 3}, 3)]
)
def test_a_job_knows_its_trial(sweeper, expected):
    assert trial_number(OmegaConf.create({"sweeper": sweeper})) == expected


@pytest.mark.parametrize(
    "missing", ["logger.csv=null", "callbacks.metrics=null", "logger", "callbacks", "evaluation=none"]
)
def test_a_run_that_will_have_no_curve_is_refused(missing):
    measured = {"extractor": {}, "metrics": ["fid"]}
    cfg = OmegaConf.create({"logger": {"csv": {}}, "callbacks": {"metrics": {}}, "evaluation": measured})
    check_measured(cfg)
    key, _, value = missing.partition("=")
    OmegaConf.update(cfg, key, {"extractor": None, "metrics": None} if value == "none" else None, merge=False)
    with pytest.raises(ValueError, match=f"with {missing}.* there is no curve"):
        check_measured(cfg)


def measured_every(kimg):
    metrics = {"every_kimg": kimg}
    config = {
        "batch_size": 16,
        "callbacks": {"metrics": metrics},
        "logger": {"csv": {}},
        "evaluation": {"metrics": ["fid"]},
    }
    return OmegaConf.create(config | {"method": {"kimg": 0.2}, "plan": False})


def test_a_run_that_would_be_measured_at_its_end_alone_is_refused():
    check_interval(measured_every(0.192), steps=13)  # after twelve steps
    with pytest.raises(
        ValueError, match=r"a training of 0.208 kimg, measured every 0.193 kimg, is measured at its end alone"
    ):
        check_interval(measured_every(0.193), steps=13)


def test_a_search_without_m_is_refused_and_a_process_of_a_trial_is_not():
    def command(trial, sweep):
        return OmegaConf.create({"sweeper": {"n_trials": 3, "trial": trial}, "runtime": {"choices": {"sweep": sweep}}})

    check_multirun(command(0, "grid"))
    check_multirun(OmegaConf.create({"sweeper": {"params": None}}))
    for sweep, chosen in (("grid", "hydra/sweeper=search"), ("weights", "sweep=weights")):
        with pytest.raises(ValueError, match=f"without -m this is one run, no search: add -m, or leave {chosen} out"):
            check_multirun(command(None, sweep))


class Trials(Jobs):
    """Jobs of a search that end as `ends` says by the trial's number; else complete, with a curve that ends at 5.5."""

    def __init__(self, folder, every_kimg=0.08):
        self.folder, self.config, self.ends, self.launched = folder, measured_every(every_kimg), {}, []
        self.dies, self._launcher = False, SimpleNamespace(launch=self._answer)

    def compose(self, overrides):
        return self.config

    def job(self, overrides, options):
        return Job(tuple(overrides), options, RunFolder(self.folder / f"run-{options['trial']}"))

    def _answer(self, jobs, initial_job_idx):
        returns = []
        for number in (int(overrides[-1].removeprefix("hydra.sweeper.trial=")) for overrides in jobs):
            self.launched.append(number)
            run, end = RunFolder(self.folder / f"run-{number}"), self.ends.get(number, "complete")
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            run.last.touch()
            if end == "complete":
                (run.path / "metrics.csv").write_text(HEAD + "1,20,2,0.1,,9\n5,60,6,0.3,,5.5\n")
                save_records(run.metrics, [])
            elif end == "pruned":
                run.pruned.touch()
            returned = JobReturn()
            returned.status = JobStatus.FAILED if isinstance(end, Exception) else JobStatus.COMPLETED
            returned.return_value = end if isinstance(end, Exception) else {"complete": 5.5}.get(end)
            returns.append(returned)
        if self.dies:
            raise RuntimeError("a worker was killed")
        return returns

    def search(self, n_trials):
        """The states of the study's trials after a search of three at once, and its exit code."""
        settings, space = Settings(0, 3, None, 0.25), OverridesParser.create().parse_overrides(["a=interval(0,1)"])
        code = 0
        try:
            run_search(self, space, n_trials, 3, settings)
        except SystemExit as end:
            code = end.code
        return [trial.state.name for trial in open_study(self.folder).get_trials()], code


def test_trials_whose_launcher_died_or_that_still_run_under_it_are_taken_up_again(tmp_path, capsys):
    trials = Trials(tmp_path)
    trials.ends, trials.dies = {1: "pruned", 2: "half"}, True
    assert trials.search(6) == (["COMPLETE", "PRUNED", "RUNNING"], 1)
    assert open_study(tmp_path).get_trials()[0].value == 5.5  # whose answer was lost
    assert "run-2 interrupted: its launcher stopped: RuntimeError: a worker was killed" in capsys.readouterr().out
    trials.ends, trials.dies = {2: JobInUse("another process trains this run"), 3: JobFailed("bad")}, False
    assert trials.search(4) == (["COMPLETE", "PRUNED", "RUNNING", "FAIL"], 1)
    trials.ends = {}
    assert trials.search(4) == (["COMPLETE", "PRUNED", "COMPLETE", "FAIL", "COMPLETE"], 0)
    assert trials.launched == [0, 1, 2, 2, 3, 2, 4]


def test_a_search_without_curves_is_refused_before_its_first_job(tmp_path):
    with pytest.raises(
        ValueError, match="a training of 0.208 kimg, measured every 0.3 kimg, is measured at its end alone"
    ):
        Trials(tmp_path / "search", every_kimg=0.3).search(4)
    assert not (tmp_path / "search").exists()
