"""Run folders to groups, and what is left out."""

import json
from pathlib import Path

import pytest
from convergence_tools import curve, decay, stored, write_run

from stillhouse.analysis.compare_convergence import compare_runs, write_convergence
from stillhouse.analysis.config_groups import (
    comparable_options,
    compared_options,
    labels,
    measuring_difference,
    other_differences,
)
from stillhouse.analysis.convergence import convergence_from_json
from stillhouse.analysis.curves import Cost
from stillhouse.metrics.records import Record, save_records

CONFIG = {
    "seed": 0,
    "name": "a",
    "folder": "runs/a",
    "batch_size": 16,
    "method": {"_target_": "M", "name": "base", "seed": 0, "lr": 0.001, "kimg": 64, "cache": "runs/a/targets"},
    "teacher": {"steps": 10},
    "data": {"name": "digits", "seed": 0, "root": "data", "batch_size": 16},
    "evaluation": {"num_samples": 2000, "extractor": {"_target_": "E"}, "training": {"every_kimg": 16}},
    "callbacks": {"ema": {"averages": [{"halflife_kimg": 500}]}, "checkpoints": None, "grid": {"every_kimg": 16}},
    "logger": {"csv": {"folder": "runs/a"}},
    "trainer": {"devices": 1, "log_every_n_steps": 10},
}


def changed(**leaves):
    """CONFIG with leaves such as method__lr=0.1."""
    config = json.loads(json.dumps(CONFIG))
    for path, value in leaves.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


@pytest.mark.parametrize(
    "leaves",
    [
        {"seed": 1, "method__seed": 1, "data__seed": 1},
        {"name": "b", "folder": "runs/b", "method__cache": "runs/b/targets", "logger__csv": {"folder": "runs/b"}},
        {"callbacks__checkpoints": {"every_n_steps": 3}, "callbacks__grid": None, "logger__wandb": {"project": "p"}},
        {"evaluation__num_samples": 50_000, "trainer__log_every_n_steps": 1, "data__root": "/data"},
    ],
)
def test_what_does_not_matter_makes_no_group(leaves):
    assert comparable_options(changed(**leaves)) == comparable_options(CONFIG)


@pytest.mark.parametrize(
    ("leaves", "label"),
    [
        ({"method__lr": 0.1}, "lr=0.1"),
        ({"callbacks__ema": {"averages": [{"decay": 0.9}]}}, 'averages=[{"decay": 0.9}]'),
        ({"trainer__devices": 2, "evaluation__training__every_kimg": 8}, "every_kimg=8 devices=2"),
        ({"method__extra": True}, "extra=true"),
        ({"teacher__steps": 5, "method__steps": 3}, "teacher.steps=5 method.steps=3"),
        ({"folder": "runs/b", "method__cache": "runs/a/targets"}, "cache=runs/a/targets"),
    ],
)
def test_a_group_is_named_by_what_sets_it_apart(leaves, label):
    first, second = labels([comparable_options(CONFIG), comparable_options(changed(**leaves))])
    assert second.startswith("base ")
    assert set(second.split()) == {"base", *label.split()}
    assert first != second


def test_methods_are_named_alone_and_copies_once():
    other = changed(method__name="fast", method__own=1)
    apart = changed(method__name="fast", method__teacher={"steps": 5}, teacher__steps=5)
    last = changed(method__name="fast", method__teacher={"steps": 10})
    assert labels([comparable_options(c) for c in (CONFIG, CONFIG, other)]) == ["base", "base", "fast"]
    assert labels([comparable_options(c) for c in (CONFIG, apart, last)]) == ["base", "fast steps=5", "fast steps=10"]


def with_teachers(*names, **changes):
    """CONFIG of a method with several teachers, of which the last one has the changes."""
    teachers = [
        {"name": name, "weights": f"{name}.safetensors", "network": {"width": 8}, "steps": 10} for name in names
    ]
    teachers[-1] |= changes
    return changed(method__teachers=teachers)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([("a", "b"), ("a", "b")], ["", ""]),
        ([("a", "b"), ("a",)], ["teachers=a,b", "teachers=a"]),
        ([("a", "b"), ("b", "a"), ("a", "b")], ["teachers=a,b", "teachers=b,a", "teachers=a,b"]),
    ],
)
def test_lists_of_named_configs_are_labelled_by_names(configs, expected):
    found = labels([comparable_options(with_teachers(*names)) for names in configs])
    assert found == [f"base {label}".strip() for label in expected]


def test_named_configs_are_compared_by_all_that_they_hold():
    plain, longer, wider = (with_teachers("a", "b", **c) for c in ({}, {"steps": 5}, {"network": {"width": 16}}))
    assert labels([comparable_options(plain), comparable_options(longer)]) == ["base steps=10", "base steps=5"]
    other = comparable_options(with_teachers("a", "c", steps=5))
    # Names and steps together: the names alone don't tell the first two apart.
    found = labels([comparable_options(plain), comparable_options(longer), other])
    assert found == ["base teachers=a,b steps=10", "base teachers=a,b steps=5", "base teachers=a,c steps=5"]
    assert labels([comparable_options(plain), comparable_options(wider)]) == ["base width=8", "base width=16"]
    assert other_differences(comparable_options(plain), comparable_options(longer)) == ["steps 5, not 10"]


def chained(seed, *names, **changes):
    """A run whose teachers are conf/teacher's or runs, one in `teacher` or several in a list, each of other weights."""
    found = (
        with_teachers(*names)
        if len(names) > 1
        else changed(teacher={"name": names[0], "weights": names[0], "steps": 10})
    )
    return found | {"seed": seed} | changes


def test_teachers_of_the_same_seed_make_one_group_and_a_shared_one_another():
    for names in (
        ["rf1", "reflow-seed{}"],
        ["reflow-seed{}"],
        ["reflow-seed{}-lr-0.1", "rf1"],
        ["a-seed{}", "b-seed{}"],
    ):
        for seeds in ((0, 1, 2), (1, 11)):
            own = [chained(seed, *(name.format(seed) for name in names)) for seed in seeds]
            assert labels(compared_options(own)) == ["base"] * len(seeds)
            assert len({json.dumps(options) for options in compared_options(own)}) == 1
        common = [chained(seed, *(name.format(1) for name in names)) for seed in (0, 1, 2)]
        assert labels(compared_options(common)) == ["base"] * 3
        assert len(set(labels(compared_options([*own, chained(0, *(name.format(11) for name in names))])))) == 2
    own = [chained(seed, "rf1", f"reflow-seed{seed}") for seed in (0, 1)]
    other = chained(0, "rf1", "reflow-seed0", batch_size=8)
    assert labels(compared_options([*own, other])) == ["base batch_size=16"] * 2 + ["base batch_size=8"]
    found = labels(compared_options([*own, chained(0, "rf1", "rf2"), chained(1, "rf1", "rf2")]))
    assert found == ["base teachers=rf1,reflow-seed*"] * 2 + ["base teachers=rf1,rf2"] * 2


def test_options_that_methods_share_are_compared():
    other = comparable_options(
        changed(method__name="fast", method___target_="N", method__own=1, method__lr=0.1, batch_size=32)
    )
    assert sorted(other_differences(comparable_options(CONFIG), other)) == [
        "batch_size 32, not 16",
        "lr 0.1, not 0.001",
    ]
    assert other_differences(comparable_options(CONFIG), comparable_options(CONFIG)) == []


def test_other_data_and_features_are_not_comparable():
    base = comparable_options(CONFIG)
    assert measuring_difference(base, comparable_options(changed(data__batch_size=32, method__name="fast"))) is None
    assert measuring_difference(base, comparable_options(changed(data__name="cifar10"))) == "data.name"
    assert measuring_difference(base, comparable_options(changed(evaluation__extractor={"_target_": "F"}))) == (
        "evaluation.extractor._target_"
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """base-seed0 .. 2 and fast-seed0 .. 2 with a preparation, as runs/...; the paths in that order."""
    monkeypatch.chdir(tmp_path)
    preparation = Cost(600, 9600, 12.5)
    curves = [curve("base", decay(0.3), every=1309, seed=s) for s in range(3)]
    curves += [curve("fast", decay(0.3), seed=s, preparation=preparation) for s in range(3)]
    return [write_run(Path("runs") / c.name, c) for c in curves]


def test_the_first_run_named_is_of_the_baseline(runs):
    forth, back = compare_runs(stored(runs)), compare_runs(stored(runs[::-1]))
    assert (forth.baseline, back.baseline) == ("base", "fast")
    assert [c.seed for c in forth.groups["fast"]] == [0, 1, 2]
    assert forth.speed_up("fast", 1.0, "updates").median == pytest.approx(13.09)
    assert back.speed_up("base", 1.0, "updates").median == pytest.approx(1 / 13.09)
    assert forth.notes == ()


def test_the_report_is_printed_and_written(runs, tmp_path):
    teacher = {"metric": "fid_digits", "subject": "teacher", "nfe": 19, "mean": 0.1, "std": None, "values": [0.1]}
    record = Record("digits", **teacher, images_per_second=None, fingerprint={"num_samples": 2000})
    save_records(runs[4] / "monitoring.json", [record])
    printed = write_convergence(stored(runs), tmp_path / "out")
    assert "13.1x (13.1 .. 13.1)" in printed
    assert printed.endswith(f"{tmp_path}/out/convergence.json and convergence.png written")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["convergence.json", "convergence.png"]
    content = json.loads((tmp_path / "out/convergence.json").read_text())
    assert convergence_from_json(content) == compare_runs(stored(runs))


def test_incomparable_runs_are_left_out_with_the_reason(runs):
    (runs[1] / "metrics.json").unlink()
    (runs[2] / "metrics.csv").unlink()
    text = (runs[4] / "metrics.csv").read_text()
    (runs[4] / "metrics.csv").write_text(text.replace("2k/", "5k/"))
    other = write_run(runs[0].parent / "other", curve("fast", [1.0] * 3, seed=9), data={"name": "cifar10"})
    twin = write_run(runs[0].parent / "twin", curve("base", [0.5, 0.25, 0.2]))
    comparison = compare_runs(stored([*runs, other, twin]))
    assert [c.name for c in comparison.curves] == ["base-seed0", "fast-seed0", "fast-seed2"]
    assert comparison.notes == (
        "runs/base-seed1 left out of the comparison: it is not complete; the command that started it resumes it",
        "runs/base-seed2 left out of the comparison: no runs/base-seed2/metrics.csv; only runs with logger.csv have curves",
        "runs/fast-seed1 left out of the comparison: runs/fast-seed1/metrics.csv has no column fid_digits_2k/ema_...; "
        "it has fid_digits_5k/ema_10kimg",
        "runs/other left out of the comparison: its data.name is cifar10, but the first run's is digits",
        "runs/twin left out of the comparison: it has the configuration and the seed of base-seed0",
    )


def test_without_a_baseline_there_is_nothing_to_compare(runs, tmp_path):
    for path in runs[:3]:
        (path / "metrics.csv").unlink()
    with pytest.raises(ValueError, match="no curve of the baseline base\nruns/base-seed0 left out"):
        compare_runs(stored(runs))
    printed = write_convergence(stored(runs), tmp_path / "out")
    assert printed.startswith("convergence not compared: no curve of the baseline base\n")
    assert len(printed.splitlines()) == 4
    assert not (tmp_path / "out").exists()


def test_one_group_is_drawn_alone(runs, tmp_path):
    printed = write_convergence(stored(runs[:3]), tmp_path)
    assert "Times faster" not in printed
    assert (tmp_path / "convergence.png").stat().st_size > 1000


def test_groups_with_other_common_options_are_noted(runs):
    path = write_run(runs[0].parent / "lr", curve("faster", decay(0.4)), batch_size=32)
    base = write_run(runs[0].parent / "first", curve("base", decay(0.2)), batch_size=16)
    assert compare_runs(stored([base, path])).notes == (
        "faster differs from base in options that both have: batch_size 32, not 16",
    )


def test_weights_can_be_chosen(runs):
    with_raw = write_run(runs[0].parent / "raw", curve("other", decay(0.4)), raw=True)
    assert compare_runs(stored([with_raw, *runs]), weights="raw").curves[0].weights == "raw"
    assert len(compare_runs(stored([with_raw, *runs]), weights="raw").notes) == 6
