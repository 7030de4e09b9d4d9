"""The table of the papers' claims, from runs whose numbers are known by hand."""

import json
import re
from dataclasses import replace

import pytest
from convergence_tools import NOTHING, curve, decay, write_run
from quality_tools import REAL, students, teachers

from benchmarks.evidence.claims import CLAIMS
from results import pages
from results.__main__ import main
from results.claims import claim_rows
from results.pages import measured_entries, section, updated
from results.trained import TrainedRuns
from stillhouse.analysis.curves import Cost
from stillhouse.metrics.records import save_records

OPTIONS = {"lr": 1e-3, "loss": "l2", "nodes": 3, "interval": 5, "order": 2}
TEACHER = {"name": "digits", "solver": "euler", "steps": 100}


def run(folder, name, values, *, seed=0, rate=0.3, preparation=NOTHING, teacher=None):
    """A run of `benchmarks.evidence`: {NFE: distance} at its end, and a curve that falls at a rate."""
    method = name.partition("-")[0]
    made = replace(curve(method, decay(rate), seed=seed, preparation=preparation), name=name)
    options = {"_target_": "M", "store": "data", "teachers": [{**TEACHER, "weights": "w"}, {"name": "reflow-seed0"}]}
    options |= {"teacher": {**TEACHER, "network": {"width": 8}}, **OPTIONS}
    path = write_run(folder / f"{name}-seed{seed}", made, method=options)
    provenance = {"revision": None, "config": "b" * 64, "weights": "c" * 64}
    found = students(values) + (teachers(teacher, solver="euler") if teacher else [])
    found = [replace(r, provenance=provenance, images_per_second=3000.0 / r.nfe) for r in found]
    save_records(path / "metrics.json", [*found, REAL])


@pytest.fixture
def folder(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "evidence.json").write_text(json.dumps({"data": "digits", "options": []}))
    return runs


def collected(tmp_path, folder):
    target = tmp_path / "claims-digits.json"
    main(["claims", str(target), str(folder)])
    runs = TrainedRuns.from_json(json.loads(target.read_text())["claims"])
    return target, {(row.claim, row.setting): row for row in claim_rows(runs)}


def test_each_claim_that_has_runs_has_a_row(tmp_path, folder, monkeypatch):
    for seed, distance in ((0, 0.3), (1, 0.5)):
        run(folder, "denoising_student", {1: distance}, seed=seed, teacher={100: 0.2})
    run(folder, "diff_instruct-sigma2.5-fake1", {1: 0.4}, rate=0.1)
    run(folder, "disback-sigma2.5-fake1", {1: 0.4}, rate=0.4, preparation=Cost(10, 160, 5.0))
    for host, distance in (("sfd-1", 0.5), ("b_dense_sfd-1", 0.4), ("sfd-2", 0.2), ("b_dense_sfd-2", 0.3)):
        run(folder, host, {int(host[-1]): distance}, rate=0.2 if "dense" in host else 0.1)
    for host, distance in (("progressive", 0.5), ("b_dense_progressive", 0.6)):  # whose curves are of their last round
        run(folder, host, {1: distance, 2: distance / 2}, rate=0.1 if "dense" in host else 0.2)
    run(folder, "bezier", {1: 0.3})
    run(folder, "flow_distill-rf2", {1: 0.25})
    for seed in (0, 1):  # a second one has no partner
        run(folder, "flow_distill-rf2-2", {2: 0.2}, seed=seed)
        run(folder, "b_dense_student", {1: 0.6}, seed=seed)

    target, rows = collected(tmp_path, folder)
    student = rows["denoising_student", "L2"]
    assert student.holds == "in part"  # 1.5 and 2.5 times
    assert student.seeds == (0, 1)
    assert "0.40 ± 0.14 in 1 evaluation, the teacher 0.2 in 100: 2 times the distance" in student.measured
    assert "100 times as fast" in student.measured
    (disback,) = (row for (claim, _), row in rows.items() if claim == "disback")
    assert disback.holds == "yes"
    ahead, behind = (rows["b_dense", f"on SFD, {nfe} NFE"] for nfe in (1, 2))
    assert (ahead.holds, behind.holds) == ("yes", "no")
    # exp(-0.1 i) - exp(-0.2 i) is greatest at i = 10 ln 2, the eighth of the measurements after 100 updates of 16 images.
    assert re.fullmatch(r"0.4 against 0.5; largest lead \S+ at 12.8 of 48 kimg", ahead.measured)
    rounds = [rows["b_dense", f"on progressive distillation, {nfe} NFE"].measured for nfe in (1, 2)]
    assert rounds == ["0.6 against 0.5; never ahead on the way", "0.3 against 0.25"]
    (bezier,) = (row for (claim, _), row in rows.items() if claim == "bezier")
    assert bezier.holds == "no"
    assert bezier.measured == "1 NFE: 0.3, distilled 2-RF 0.25, 2 NFE: distilled 2-RF 0.2 (seed 0, 1)"

    (stored,) = {
        json.dumps(each["options"], sort_keys=True) for each in json.loads(target.read_text())["claims"]["runs"]
    }
    assert json.loads(stored) == {"teacher": TEACHER, "teachers": [TEACHER, {"name": "reflow-seed0"}], **OPTIONS}
    text = section(target)
    assert "| claim | measured | holds | seeds of each |" in text
    assert "Commits of the runs: unknown." in text
    assert len(measured_entries(json.loads(target.read_text()))) == 20
    assert "The papers' claims on digits" not in updated(pages.README.read_text())
    monkeypatch.setattr(pages, "summary", lambda: "")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    readme = updated(pages.README.read_text())
    assert "The papers' claims on digits, in fid_digits" in readme
    assert "| settings in which it holds | seeds of each |" in readme
    assert re.search(r"\| Denoising Student \| .* \| 0 of 1 \| 0, 1 \|", readme)
    assert re.search(r"\| B-DENSE \| .* \| 1 of 5 \| 0 \(in 4 of 5\); 0, 1 \(in 1 of 5\) \|", readme)


def test_the_stored_runs_have_the_options_that_their_claims_give():
    given = {run.name: dict(o.split("=") for o in run.options) for claim in CLAIMS for run in claim.runs}
    stored = [
        each for path in pages.RESULTS.glob("claims-*.json") for each in json.loads(path.read_text())["claims"]["runs"]
    ]
    for each in stored:
        options, teacher = each["options"], each["options"].get("teacher", {})
        for key, value in given[each["name"]].items():
            group, _, name = key.rpartition(".")
            if group and "{" not in value:
                assert str({"method": options, "teacher": teacher}[group][name]) == value, (each["name"], key)
    assert len(stored) > 40


def test_runs_of_another_machine_are_added_to_those_of_one_that_is_gone(tmp_path, folder):
    run(folder, "denoising_student", {1: 0.3}, teacher={100: 0.2})
    run(folder, "sfd-1", {1: 0.5}, rate=0.1)
    run(folder, "b_dense_sfd-1", {1: 0.4}, rate=0.2)
    target, alone = collected(tmp_path, folder)
    gone = target.read_text()
    for path in folder.glob("*-seed*"):
        path.rename(tmp_path / path.name)
    run(folder, "sfd-1", {1: 0.3}, seed=1, rate=0.1)
    run(folder, "b_dense_sfd-1", {1: 0.6}, seed=1, rate=0.2)
    run(folder, "denoising_student", {1: 0.35}, teacher={100: 0.2})  # the same run once more

    _, both = collected(tmp_path, folder)
    assert alone["b_dense", "on SFD, 1 NFE"].holds == "yes"
    b_dense = both["b_dense", "on SFD, 1 NFE"]
    assert (b_dense.holds, b_dense.seeds) == ("in part", (0, 1))
    assert b_dense.measured.startswith("0.50 ± 0.14 against 0.40 ± 0.14; largest lead")
    assert both["denoising_student", "L2"].measured.startswith("0.35 in 1 evaluation")

    (folder / "evidence.json").write_text(json.dumps({"data": "fashion_mnist16", "options": []}))
    target.write_text(gone)
    with pytest.raises(ValueError, match=r"claims-digits.json can't take these runs: .*of digits.*of fashion_mnist16"):
        collected(tmp_path, folder)
    assert target.read_text() == gone


def test_a_folder_without_finished_runs_and_unlike_measurements_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no finished run of a claim"):
        collected(tmp_path, folder)
    run(folder, "sfd-1", {1: 0.5})
    run(folder, "b_dense_sfd-1", {1: 0.5})
    path = folder / "sfd-1-seed0/metrics.json"
    path.write_text(path.read_text().replace("2000", "100"))
    with pytest.raises(ValueError, match="runs: the runs were not measured alike"):
        collected(tmp_path, folder)
