import json
from dataclasses import replace

import pytest
from convergence_tools import curve, decay, write_run

from stillhouse.analysis.convergence import Comparison, convergence_from_json, convergence_to_json
from stillhouse.analysis.curves import Cost, read_curve

PREPARATION = Cost(600, 9600, 12.5)


def test_a_curve_comes_back_from_its_folder(tmp_path):
    written = curve("fast", decay(0.3), seed=3, preparation=PREPARATION)
    folder = write_run(tmp_path / "fast-seed3", written, raw=True)
    assert read_curve(folder, "fast", 3) == written
    doubled = replace(written, weights="raw", values=tuple(2 * v for v in written.values))
    assert read_curve(folder, "fast", 3, weights="raw") == doubled
    (folder / "preparation.json").unlink()
    assert read_curve(folder, "fast", 3, metric="fid_digits_2k").preparation == Cost()


def test_the_first_average_of_a_fid_goes_before_other_columns(tmp_path):
    head = "step,nimg,kid_1k/ema_1,fid_a_1k/raw,fid_a_1k/ema_2,fid_b_1k/ema_1,speed/training_seconds"
    rows = [f"{i},{i},1,2,3,4,{i},{i}" for i in (1, 2)]
    (tmp_path / "metrics.csv").write_text("\n".join([f"{head},progress/student_updates", *rows, ""]))
    found = [read_curve(tmp_path, "g", 0, **kw) for kw in ({}, {"metric": "fid_b_1k"}, {"weights": "raw"})]
    assert [(c.metric, c.weights, c.values[0]) for c in found] == [
        ("fid_a_1k", "ema_2", 3),
        ("fid_b_1k", "ema_1", 4),
        ("fid_a_1k", "raw", 2),
    ]
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text.replace("ema", "other"))
    assert read_curve(tmp_path, "g", 0).weights == "raw"


def damaged(tmp_path, old, new, file="metrics.csv"):
    folder = write_run(tmp_path / "run", curve("fast", [3, 2.5, 1], preparation=PREPARATION))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("progress/student_updates", "x", "lacks nimg, progress/student_updates or .* train that run again"),
        (",100,50.0", ",,50.0", "lacks nimg, progress/student_updates"),
        ("fid_digits_2k", "kid_digits_2k", "has no column fid.../ema_...; it has no curve of a fid"),
        (",2.5,", ",nan,", "has a fid_digits_2k/ema_10kimg that is not finite"),
        ("step,nimg", "", "has no column"),
    ],
)
def test_unusable_tables_are_named(tmp_path, old, new, message):
    folder = damaged(tmp_path, old, new)
    if not new:
        (folder / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=f"metrics.csv {message}"):
        read_curve(folder, "fast", 0)


def test_one_measurement_is_no_curve(tmp_path):
    folder = damaged(tmp_path, ",2.5,", ",,")
    text = (folder / "metrics.csv").read_text().replace(",1,300,", ",,300,")
    (folder / "metrics.csv").write_text(text)
    with pytest.raises(
        ValueError, match="has 1 measurements of fid_digits_2k/ema_10kimg, .* lower evaluation.training.every_kimg"
    ):
        read_curve(folder, "fast", 0)


@pytest.mark.parametrize(("old", "new"), [('"steps"', '"step"'), ("{", ""), ("12.5", '"long"'), ("600", "null")])
def test_a_damaged_preparation_is_named(tmp_path, old, new):
    with pytest.raises(ValueError, match=r"run/preparation.json is damaged"):
        read_curve(damaged(tmp_path, old, new, "preparation.json"), "fast", 0)


def test_what_is_asked_for_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*/none/metrics.csv; only runs with logger.csv have curves"):
        read_curve(tmp_path / "none", "fast", 0)
    folder = write_run(tmp_path / "run", curve("fast", [2, 1]))
    with pytest.raises(ValueError, match=r"no column fid.../raw; it has fid_digits_2k/ema_10kimg"):
        read_curve(folder, "fast", 0, weights="raw")
    with pytest.raises(ValueError, match=r"no column fid_digits_5k/ema_...; it has fid_digits_2k/ema_10kimg"):
        read_curve(folder, "fast", 0, metric="fid_digits_5k")
    with pytest.raises(ValueError, match="metric=is_digits_2k: convergence is compared by a metric fid"):
        read_curve(folder, "fast", 0, metric="is_digits_2k")


def comparison():
    curves = [curve("base", decay(0.1 + 0.01 * s), seed=s) for s in range(3)]
    curves += [curve("fast", decay(0.4), seed=s, preparation=PREPARATION) for s in range(2)]
    return Comparison((*curves, curve("never", [9.0] * 5)), "base", ("a note",))


def test_json_holds_all_that_it_is_computed_from():
    content = json.loads(json.dumps(convergence_to_json(comparison()), allow_nan=False))
    assert convergence_from_json(content) == comparison()
    assert json.loads(json.dumps(convergence_to_json(convergence_from_json(content)))) == content


def test_json_holds_every_number_of_the_tables():
    content = convergence_to_json(comparison())
    assert content["baseline"] == "base"
    assert [t["factor"] for t in content["thresholds"]] == [1.0, 1.05, 1.2]
    assert len(content["speed_ups"]) == 3 * 2 * 2 * 3  # thresholds, groups, with and without preparation, currencies
    fast, never = (
        next(s for s in content["speed_ups"] if s["group"] == group and not s["with_preparation"])
        for group in ("fast", "never")
    )
    # The median of the baseline's bests is that of seed 1, which seed 0 never reaches.
    assert fast["pairs"] == [
        {"seed": 0, "baseline": None, "group": fast["pairs"][0]["group"]},
        {"seed": 1, "baseline": 3000, "group": fast["pairs"][1]["group"]},
    ]
    assert (fast["median"], fast["max"]) == (None, None)
    assert fast["min"] == pytest.approx(3000 / fast["pairs"][1]["group"])
    assert (never["median"], never["min"], never["max"]) == (0, 0, 0)
    run = next(run for run in content["runs"] if run["group"] == "never")
    assert run["crossings"] == [{"factor": factor, "cost": None} for factor in (1.0, 1.05, 1.2)]
    assert run["updates"] == [100, 200, 300, 400, 500]


@pytest.mark.parametrize("content", [{}, {"runs": [{}], "baseline": "a", "notes": []}, {"runs": None}])
def test_other_json_is_refused(content):
    with pytest.raises(ValueError, match="no comparison of convergence"):
        convergence_from_json(content)
