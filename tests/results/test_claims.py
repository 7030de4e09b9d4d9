"""The table of the papers' claims, from runs whose numbers are known by hand."""

import json
from dataclasses import replace

import pytest
from convergence_tools import NOTHING, curve, decay, write_run
from quality_tools import REAL, students, teachers

from results import pages
from results.__main__ import main
from results.pages import measured_entries, section, updated
from stillhouse.analysis.curves import Cost
from stillhouse.metrics.records import save_records


def run(folder, name, values, *, seed=0, rate=0.3, preparation=NOTHING, teacher=None, **config):
    """A run of `benchmarks.evidence`: {NFE: distance} at its end, and a curve that falls at a rate."""
    method = name.partition("-")[0]
    made = replace(curve(method, decay(rate), seed=seed, preparation=preparation), name=name)
    path = write_run(folder / f"{name}-seed{seed}", made, **config)
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
    content = json.loads(target.read_text())["claims"]
    return target, {(row["claim"], row["setting"]): row for row in content["rows"]}


def test_each_claim_that_has_runs_has_a_row(tmp_path, folder, monkeypatch):
    for seed, distance in ((0, 0.3), (1, 0.5)):
        run(folder, "denoising_student", {1: distance}, seed=seed, teacher={100: 0.2})
    run(folder, "diff_instruct-sigma2.5-fake1", {1: 0.4}, rate=0.1)
    run(folder, "disback-sigma2.5-fake1", {1: 0.4}, rate=0.4, preparation=Cost(10, 160, 5.0))
    for host, distance in (("sfd-1", 0.5), ("b_dense_sfd-1", 0.4), ("sfd-2", 0.2), ("b_dense_sfd-2", 0.3)):
        run(folder, host, {int(host[-1]): distance}, rate=0.2 if "dense" in host else 0.1)
    run(folder, "bezier", {1: 0.3})
    run(folder, "flow_distill-rf2", {1: 0.25})

    target, rows = collected(tmp_path, folder)
    student = rows["denoising_student", "L2"]
    assert student["holds"] == "in part"  # 1.5 and 2.5 times
    assert student["seeds"] == [0, 1]
    assert "0.40 ± 0.14 in 1 evaluation, the teacher 0.2 in 100: 2 times the distance" in student["measured"]
    assert "100 times as fast" in student["measured"]
    (disback,) = (row for (claim, _), row in rows.items() if claim == "disback")
    assert disback["holds"] == "yes"
    b_dense = rows["b_dense", "on SFD"]
    assert b_dense["holds"] == "in part"
    assert "ahead at every seed at 1 NFE; behind at 2 NFE; 1 NFE: 0.4 against 0.5" in b_dense["measured"]
    # exp(-0.1 i) - exp(-0.2 i) is greatest at i = 10 ln 2, the eighth of the measurements after 100 updates of 16 images.
    assert "at 12.8 of 48 kimg" in b_dense["measured"]
    (bezier,) = (row for (claim, _), row in rows.items() if claim == "bezier")
    assert bezier["holds"] == "no"
    assert "1 NFE: 0.3, distilled 2-RF 0.25" in bezier["measured"]

    text = section(target)
    assert "Commits of the runs: unknown." in text
    assert len(measured_entries(json.loads(target.read_text()))) == 12
    assert "The papers' claims on digits" not in updated(pages.README.read_text())
    monkeypatch.setattr(pages, "summary", lambda: "")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert "The papers' claims on digits, in fid_digits" in updated(pages.README.read_text())


def test_a_folder_without_finished_claims_and_unlike_measurements_are_refused(tmp_path, folder):
    run(folder, "sfd-1", {1: 0.5})  # alone
    with pytest.raises(ValueError, match="no claim whose runs are finished"):
        collected(tmp_path, folder)
    run(folder, "b_dense_sfd-1", {1: 0.5})
    path = folder / "sfd-1-seed0/metrics.json"
    path.write_text(path.read_text().replace("2000", "100"))
    with pytest.raises(ValueError, match="not measured alike"):
        collected(tmp_path, folder)
