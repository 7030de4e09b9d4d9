"""Measured folders to lines of quality against NFE, and what is left out."""

import json
import math
from dataclasses import replace

import pytest
from convergence_tools import stored
from quality_tools import FINGERPRINT, REAL, measured, students, teachers, write_measured

from stillhouse.analysis.compare_quality import compare_quality, draw_measured, write_quality
from stillhouse.analysis.config_groups import training_options
from stillhouse.analysis.quality import QualityPoint, quality_from_json, quality_to_json
from stillhouse.metrics.records import save_records


def lines(quality):
    """{label: {NFE: (mean, std, seeds)}}"""
    return {line.label: {p.nfe: (p.mean, p.std, p.seeds) for p in line.points} for line in quality.lines}


@pytest.fixture
def runs(tmp_path):
    """sfd for 1, 2 and 4 steps at seeds 0 and 1, progressive at seed 0 with evaluate.py's measurements, and a teacher."""
    paths = []
    for seed, values in enumerate([{1: 0.5, 2: 0.3, 4: 0.2}, {1: 0.7, 2: 0.4, 4: 0.2}]):
        for steps, mean in values.items():
            final = [*teachers({19: 0.16}), *students({steps: mean}), REAL]
            paths.append(write_measured(tmp_path / f"sfd{seed}-{steps}", final, seed=seed, steps=steps))
    again = students({1: 0.55, 2: 0.35, 4: 0.25, 8: 0.22})
    paths.append(write_measured(tmp_path / "pd", students({1: 0.6}), again, method="progressive", end_steps=1))
    save_records(tmp_path / "teacher/metrics.json", [*teachers({1: 9.0, 3: 2.0}), *teachers({2: 4.0}, "euler"), REAL])
    return [*paths, tmp_path / "teacher"]


def test_runs_trained_for_one_number_each_are_one_line(runs):
    quality = compare_quality(stored(runs))
    found = lines(quality)
    assert list(found) == ["sfd", "progressive", "teacher digits (heun)", "teacher digits (euler)"]
    assert found["sfd"] == {
        1: (pytest.approx(0.6), pytest.approx(0.2 / math.sqrt(2)), (0, 1)),
        2: (pytest.approx(0.35), pytest.approx(0.1 / math.sqrt(2)), (0, 1)),
        4: (pytest.approx(0.2), pytest.approx(0), (0, 1)),
    }
    assert found["progressive"] == {n: (m, None, (0,)) for n, m in {1: 0.55, 2: 0.35, 4: 0.25, 8: 0.22}.items()}
    assert found["teacher digits (heun)"] == {1: (9.0, None, ()), 3: (2.0, None, ()), 19: (0.16, None, ())}
    assert found["teacher digits (euler)"] == {2: (4.0, None, ())}
    assert (quality.metric, quality.floor, quality.fingerprint) == ("fid_digits", 0.1, FINGERPRINT)
    assert quality.counts == [1, 2, 3, 4, 8, 19]
    assert quality.notes == ()
    assert quality_from_json(json.loads(json.dumps(quality_to_json(quality)))) == quality


def test_other_options_and_lists_of_steps_split_groups(tmp_path):
    options = [{"steps": 1}, {"steps": 2}, {"steps": [1, 2]}, {"steps": 2, "lr": 0.1}]
    runs = [
        write_measured(tmp_path / f"r{i}", students({1 + i: 0.5}), **{"lr": 0.2} | o) for i, o in enumerate(options)
    ]
    assert [sorted(points) for points in lines(compare_quality(stored(runs))).values()] == [[1, 2], [3], [4]]
    watched = {"evaluation.training.every_kimg": "2", "callbacks.metrics.every_kimg": "2"}
    assert training_options({"method.steps": "4", "teacher.steps": "4", **watched}) == {"teacher.steps": "4"}


def test_unlike_fingerprints_never_meet(tmp_path):
    first = write_measured(tmp_path / "a", students({1: 0.5}), students({2: 0.1, 1: 0.2}, num_samples=200))
    other = write_measured(tmp_path / "b", students({1: 0.5, 4: 0.3}, extractor_hash="f" * 64), seed=1)
    kid = write_measured(tmp_path / "c", students({1: 0.5}, metric="kid_digits"), seed=2)
    save_records(tmp_path / "t/metrics.json", teachers({3: 1.0}, num_samples=200))
    quality = compare_quality(stored([first, other, kid, tmp_path / "t"]))
    assert lines(quality) == {"sfd": {1: (0.5, None, (0,))}}
    assert quality.floor is None
    assert quality.notes == (
        f"{first} at 2 NFE left out: num_samples 200, not 2000",
        f"{other} at 1, 4 NFE left out: extractor_hash ffffffff, not eeeeeeee",
        f"{kid} left out: no fid_digits of a student",
        f"{tmp_path}/t at 3 NFE left out: num_samples 200, not 2000",
    )
    like = measured("student", 9, 0.0, num_samples=200)
    assert lines(compare_quality(stored([first, tmp_path / "t"]), like=like)) == {
        "sfd": {1: (0.2, None, (0,)), 2: (0.1, None, (0,))},
        "teacher digits (heun)": {3: (1.0, None, ())},
    }


def test_weights_are_those_of_the_final_evaluation_or_the_ones_asked_for(tmp_path):
    again = [*students({1: 0.6, 2: 0.4}, weights="raw"), *students({2: 0.3}), *students({4: 0.2}, weights="raw")]
    run = write_measured(tmp_path / "a", students({1: 0.5}), again)
    final = compare_quality(stored([run]))
    assert {v.nfe: (v.mean, v.weights) for v in final.values} == {1: (0.5, "ema"), 2: (0.3, "ema"), 4: (0.2, "raw")}
    assert {v.nfe: v.mean for v in compare_quality(stored([run]), weights="raw").values} == {1: 0.6, 2: 0.4, 4: 0.2}


def test_the_first_of_two_values_at_one_place_is_taken(tmp_path):
    first = write_measured(tmp_path / "a", [*students({1: 0.5}), *teachers({19: 0.16})], end_steps=1)
    twin = write_measured(tmp_path / "b", [*students({2: 0.3, 1: 0.4}), *teachers({19: 0.2})], end_steps=2)
    quality = compare_quality(stored([first, twin, first]))
    assert lines(quality)["sfd"] == {1: (0.5, None, (0,)), 2: (0.3, None, (0,))}
    assert lines(quality)["teacher digits (heun)"] == {19: (0.16, None, ())}
    assert quality.notes == (
        f"{twin} at 1 NFE left out: a has its configuration, seed and NFE",
        "teacher digits (heun) at 19 NFE has two values, 0.16 and 0.2, perhaps of other weights; the second is left out",
    )


def test_runs_without_measurements_are_noted_and_other_folders_refused(runs, tmp_path):
    (runs[1] / "metrics.json").unlink()
    (runs[2] / "metrics.json").write_text("[{]")
    quality = compare_quality(stored(runs[:3]))
    assert lines(quality)["sfd"] == {1: (0.5, None, (0,))}
    unfinished, damaged = quality.notes
    assert unfinished == f"{runs[1]} left out: it is not complete; the command that started it resumes it"
    assert damaged.startswith(f"{runs[2]} left out: {runs[2]}/metrics.json is damaged")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none holds neither a run nor a measured teacher"):
        compare_quality(stored([runs[0], tmp_path / "none"]))
    with pytest.raises(ValueError, match="no value of a student; measure runs .*\n.*not complete"):
        compare_quality(stored([runs[1], runs[-1]]))
    with pytest.raises(ValueError, match="no student's fid_digits with one fingerprint\n"):
        compare_quality(stored(runs[:1]), like=measured("student", 1, 0.0, num_samples=3))


def test_the_report_is_printed_and_written(runs, tmp_path):
    printed = write_quality(stored(runs), tmp_path / "out")
    assert printed.startswith("fid_digits against NFE (ema): mean ± standard deviation over training seeds")
    assert printed.endswith(f"{tmp_path}/out/quality.json and quality.png written")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["quality.json", "quality.png"]
    assert quality_from_json(json.loads((tmp_path / "out/quality.json").read_text())) == compare_quality(stored(runs))
    assert write_quality(stored(runs[-1:]), tmp_path / "none").startswith(
        "quality against NFE not compared: no value of a student"
    )
    assert not (tmp_path / "none").exists()


def test_one_measurement_is_drawn_where_it_has_several_numbers(tmp_path):
    path = tmp_path / "quality.png"
    draw_measured(path, [*teachers({19: 0.1}), *students({1: 0.5}), REAL])
    assert not path.exists()
    draw_measured(path, [*students({1: 0.5, 2: 0.4}), *students({4: 0.3}, metric="kid_digits"), REAL])
    assert path.exists()
    path.unlink()
    draw_measured(path, [*teachers({1: 0.1, 3: 0.2}), REAL])
    assert path.exists()


def test_damaged_comparisons_are_refused(runs):
    content = quality_to_json(compare_quality(stored(runs)))
    with pytest.raises(ValueError, match="this is no comparison of quality against NFE"):
        quality_from_json({**content, "values": [{"name": "a"}]})
    with pytest.raises(ValueError, match="two values of one group have the same seed and NFE"):
        quality_from_json({**content, "values": 2 * content["values"][:1]})
    assert content["lines"][1]["points"][0] == {"nfe": 1, "mean": 0.55, "std": None, "seeds": [0]}
    assert compare_quality(stored(runs)).lines[1].points[0] == QualityPoint(1, 0.55, None, (0,))


def test_runs_of_one_name_in_several_folders_are_called_by_their_paths(tmp_path):
    paths = [write_measured(tmp_path / f"{exp}/seed0", students({1: 0.5}), lr=exp) for exp in "ab"]
    paths.append(write_measured(tmp_path / "b/seed1", students({1: 0.3}), seed=1, lr="b"))
    names = [value.name for value in compare_quality(stored(paths)).values]
    assert names == [str(paths[0]), str(paths[1]), "seed1"]


def test_a_later_measurement_of_another_checkpoint_is_no_result(tmp_path):
    def at(step, value, weights="ema"):
        training = {"step": step, "reached": 100, "total": 100}
        return [replace(record, training=training) for record in students({1: value}, weights=weights)]

    again = [*at(100, 0.8), *at(100, 0.9, "raw"), *students({2: 0.3})]  # evaluate.py checkpoint=last, and others
    run = write_measured(tmp_path / "run", at(40, 0.5), again)
    quality = compare_quality(stored([run]))
    assert lines(quality)["sfd"] == {1: (0.5, None, (0,)), 2: (0.3, None, (0,))}
    assert quality.notes == (f"{run}: evaluation/metrics.json has values after 100 of 100 training steps, left out",)
    assert lines(compare_quality(stored([run]), weights="raw"))["sfd"][1] == (0.9, None, (0,))
