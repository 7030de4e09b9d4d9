"""logger=csv alone, and the page that evaluate.py makes of stored runs."""

import json

import pytest
from end_to_end_tools import RUN, STUDENT, copied, evaluate, snapshot, train
from page_tools import Page


@pytest.mark.slow
def test_csv_alone_is_enough_for_pictures_curves_and_a_report(finished, tmp_path):
    folder = copied(finished, tmp_path)
    options = [option for option in STUDENT if option != "name=run"]
    train(folder, *options, "name=plain", "seed=1", "logger=csv").ok()
    plain = folder / "runs/plain"
    assert not (plain / "tensorboard").exists()
    assert not (plain / "wandb").exists()
    for name in ("metrics.csv", "curves.png", "samples.png", "interpolation.png"):
        assert (plain / name).is_file()
    assert list((plain / "samples").glob("*.png"))
    before = snapshot(folder / "runs")
    ended = evaluate(folder, "task=report", "run=[runs/*]", "target=pages/report.html").ok()
    assert ended.out.strip() == "pages/report.html written: 2 runs"
    assert snapshot(folder / "runs") == before  # nothing is measured
    page = Page((folder / "pages/report.html").read_text())
    assert page.foreign == []
    assert len(page.headings["h2"]) == 7
    values = [
        record["mean"]
        for path in (folder / RUN, plain)
        for record in json.loads((path / "metrics.json").read_text())
        if record["subject"] == "student"
    ]
    (row,) = (row for table in page.tables[:1] for row in table if row[0] == "denoising_student")
    assert row[2] == "0, 1"
    assert float(row[4].split()[0]) == round(sum(values) / 2, len(row[4].split()[0].partition(".")[2]))
    (costs,) = (table for table in page.tables if table[0][3:] == ["kimg", "seconds", "network evaluations"])
    assert costs[1][3:] == ["0.208", costs[1][4], "448"]  # 13 steps of 16 images, and 80 pairs of 3 evaluations
    (curves,) = (table for table in page.tables if table[0][-1] == "spread of last third")
    assert curves[1][:2] == ["denoising_student", "0, 1"]
    (provenance,) = (table for table in page.tables if table[0][0] == "run")
    assert {len(cell) for row in provenance[1:] for cell in row[2:4]} == {64}
