"""python train.py -m: every combination of options, the table at the end, and going on after a kill."""

import sys
from functools import partial

import pytest
from end_to_end_tools import PRETRAIN, assert_same_run, kill_at, read_csv, read_json, train
from omegaconf import OmegaConf

from stillhouse.analysis.tables import format_mean_std

TINY = tuple(option for option in PRETRAIN if not option.startswith("name="))
SWEEP = ("-m", *TINY, "callbacks.grid=null", "method.lr=1e-3,-1", "seed=0,1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    ended = train(folder, *SWEEP)
    (folder / "said").write_text(ended.out)
    return folder, ended


def runs(folder):
    """{(lr, seed): run folder} of the complete ones."""
    found = {}
    for path in (folder / "runs").glob("*/metrics.json"):
        config = OmegaConf.load(path.parent / "config.yaml")
        found[config.method.lr, config.seed] = path.parent
    return found


def lines_of(table, number=0):
    """The cells of a table in a sweep's file, the first of the jobs and the second over seeds."""
    return [line.strip("| ").split(" | ") for line in table.read_text().split("\n\n")[number].splitlines()]


def test_failed_jobs_do_not_stop_the_others_and_stand_in_the_table(swept):
    folder, ended = swept
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert len(ended.errors) == 2
    complete = runs(folder)
    assert sorted(complete) == [(1e-3, 0), (1e-3, 1)]
    (table,) = (folder / "runs").glob("sweep-*.md")
    text = table.read_text()
    assert "method.lr-1e-3-1-seed-0-1" in table.name or table.name.count("-") > 5
    head, _, *rows = lines_of(table)
    assert head == ["run", "state", "method.lr", "seed", "NFE", "on the way", "fid_digits"]
    assert [row[1] for row in rows] == ["complete"] * 2 + ["failed"] * 2
    for row in rows:
        if row[1] == "complete":
            path = complete[float(row[2]), int(row[3])]
            student = next(r for r in read_json(path / "metrics.json") if r["subject"] == "student")
            ends_at = [
                value for line in read_csv(path / "metrics.csv") if (value := line["fid_digits_20/ema_500kimg"])
            ][-1]
            assert (row[0], row[6]) == (path.name, format_mean_std(student["mean"], student["std"]))
            assert row[5] == f"{float(ends_at):.4g}"  # of the monitoring seeds
        else:
            assert row[4:] == ["–"] * 3
    assert text.count("failed: method: lr must be a positive number, got -1") == 2
    assert "failed: method: lr must be a positive number, got -1" in ended.out
    assert f"{table.relative_to(folder)} written" in ended.out


def test_seeds_of_equal_options_have_their_mean_and_deviation(swept):
    folder, _ = swept
    (table,) = (folder / "runs").glob("sweep-*.md")
    head, _, *rows = lines_of(table, 1)
    assert head[0] == "options"
    (row,) = rows
    assert row[0] == "method.lr=0.001"
    means = [
        next(r["mean"] for r in read_json(runs(folder)[1e-3, seed] / "metrics.json") if r["subject"] == "student")
        for seed in (0, 1)
    ]
    middle = sum(means) / 2
    assert row[2] == "2"
    watched = [float(line[5]) for line in lines_of(table) if line[1] == "complete"]
    assert float(row[4].split(" ± ")[0]) == pytest.approx(sum(watched) / 2, rel=0.05)
    assert row[5] == format_mean_std(middle, 2**0.5 * abs(means[0] - middle))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_is_missing(swept, tmp_path):
    """Killed in its second job: the first says that it is complete, the second resumes, the others run."""
    folder, _ = swept
    train(tmp_path, *SWEEP, before=kill_at("callbacks:GenerativeMetrics.evaluate", 5)).killed()
    assert list(runs(tmp_path)) == [(1e-3, 0)]
    assert not list((tmp_path / "runs").glob("sweep-*.md"))
    before = (runs(tmp_path)[1e-3, 0] / "metrics.json").stat().st_mtime_ns
    ended = train(tmp_path, *SWEEP)
    assert ended.code == 1  # of the two that can't be
    assert ended.out.count(" is complete:") == 1
    ours, theirs = runs(tmp_path), runs(folder)
    assert (ours[1e-3, 0] / "metrics.json").stat().st_mtime_ns == before
    assert ours.keys() == theirs.keys()
    for key, path in ours.items():
        assert_same_run(path, theirs[key])
    (table,), (other,) = ((f / "runs").glob("sweep-*.md") for f in (tmp_path, folder))
    assert (table.name, table.read_text()) == (other.name, other.read_text())


def hide(module: str) -> None:
    sys.modules[module] = None


@pytest.mark.parametrize(
    ("launcher", "module", "extra"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher", "joblib"),
        ("submitit_slurm", "hydra_plugins.hydra_submitit_launcher", "submitit"),
    ],
)
def test_a_missing_launcher_is_named(tmp_path, launcher, module, extra):
    ended = train(tmp_path, "-m", f"hydra/launcher={launcher}", "seed=0,1", before=partial(hide, module))
    ended.refused(f"hydra/launcher={launcher}", f"needs the package {module}", f"pip install -e '.[{extra}]'")


def test_a_search_and_its_options_are_refused_where_nothing_searches(tmp_path):
    train(tmp_path, "-m", *TINY, "seed=0,1", "hydra.sweeper.n_trials=3").refused(
        "hydra.sweeper.n_trials is an option of a search, and this command has none: add -m hydra/sweeper=search"
    )
    alone = "without -m this is one run, no search: add -m, or leave sweep=b_dense_branch_weights out"
    train(tmp_path, *TINY, "sweep=b_dense_branch_weights").refused(alone)
    assert not list(tmp_path.glob("runs/*"))
