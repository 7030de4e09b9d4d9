import json
from dataclasses import replace
from pathlib import Path

import pytest
from convergence_tools import curve, decay, write_run
from omegaconf import OmegaConf
from page_tools import Page
from PIL import Image
from quality_tools import REAL, students, teachers, write_measured

from launch.evaluate.report import check_target, main, write_report
from stillhouse.metrics.records import save_records

TRACE = {"revision": "a" * 40, "config": "b" * 64, "weights": "c" * 64}


def run(folder, seed, value, *, method="sfd", steps=1, **fingerprint):
    """A complete run with a curve, a picture and a card, whose student was measured as `value`."""
    path = folder / f"{method}-seed{seed}-steps{steps}"
    # A rate that has its curve end at another place for each seed.
    write_run(path, curve(method, decay(0.3 + seed / 100), seed=seed), data={"name": "digits"}, method={"steps": steps})
    records = students({steps: value}, name=path.name, **fingerprint)
    save_records(path / "metrics.json", [*teachers({19: 0.15}), *records, REAL])
    stored = json.loads((path / "metrics.json").read_text())
    for record in stored:
        record["provenance"] = TRACE if record["subject"] == "student" else None
    (path / "metrics.json").write_text(json.dumps(stored))
    Image.new("RGB", (40, 30), (10 * seed, 0, 0)).save(path / "samples.png")
    (path / "student.json").write_text(json.dumps({"kimg": 48.0, "network_evaluations": 1000.0 * (seed + 1)}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for seed, value in ((0, 0.30), (1, 0.40)):
        run(folder / "runs", seed, value)
    run(folder / "runs", 0, 0.2, steps=4)
    run(folder / "runs", 0, 0.5, method="other<b>", num_samples=50)
    unfinished = run(folder / "runs", 5, 0.2, method="late")
    (unfinished / "metrics.json").unlink()
    damaged = run(folder / "runs", 6, 0.2, method="bad")
    (damaged / "metrics.json").write_text("[{")
    (folder / "runs/comparison").mkdir()
    (folder / "runs/teacher-digits").mkdir()
    save_records(folder / "runs/teacher-digits/metrics.json", teachers({9: 0.25}))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    said = write_report(folder / "report.html", [f"{folder}/runs/*"])
    assert said == f"{folder}/report.html written: 4 runs, 2 left out"
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["report.html"]
    return Page((folder / "report.html").read_text())


def test_the_page_is_whole_and_needs_nothing_else(page):
    assert page.foreign == []
    assert page.headings["h1"] == ["Stillhouse report"]
    assert page.headings["h2"] == [
        "Results",
        "Quality against NFE",
        "Quality against cost",
        "Convergence",
        "Samples",
        "Differences of configs",
        "Where the values come from",
        "Left out",
    ]
    assert all(alt and png.startswith(b"\x89PNG") for alt, png in page.pictures)
    assert "other<b>" in page.text  # escaped, else it would be an element that is never closed


def test_seeds_share_a_row_and_unlike_fingerprints_no_table(page):
    other, first, *_ = (table for table in page.tables if "± over" in table[0])
    assert first[0] == ["group", "subject", "seeds", "NFE", "fid_digits", "± over", "images/s"]
    rows = {(row[0], row[3]): row for row in first[1:]}
    assert set(rows) == {("sfd", "1"), ("sfd", "4"), ("digits", "19"), ("digits", "9"), ("digits", "0")}
    assert rows["sfd", "1"][2:6] == ["0, 1", "1", "0.350 ± 0.071", "2 training seeds"]
    assert rows["sfd", "4"][2:6] == ["0", "4", "0.200 ± 0.020", "1 blocks"]
    assert rows["digits", "19"][4] == "0.150 ± 0.020"
    assert [row[0] for row in other[1:]] == ["other<b>"]  # teacher and real have the other fingerprint
    assert "not to be compared with the others: num_samples 50" in page.text


def test_costs_are_shown_beside_the_values(page):
    (costs,) = (table for table in page.tables if table[0][2:4] == ["fid_digits", "kimg"])
    assert costs[0] == ["group", "seeds", "fid_digits", "kimg", "seconds", "network evaluations"]
    assert costs[1] == ["sfd, 1 NFE", "0, 1", "0.35", "48", "1,500", "1,000 .. 2,000"]  # 3,000 updates of half a second


def test_curves_are_compared_with_bands_over_seeds(page):
    assert any(alt.startswith("Curves of fid_digits_2k") for alt, _ in page.pictures)
    (table,) = (table for table in page.tables if table[0][-1] == "spread of last third")
    assert [row[:2] for row in table[1:]] == [
        ["other<b> (baseline)", "0"],
        ["sfd steps=1", "0, 1"],
        ["sfd steps=4", "0"],
    ]


def test_samples_of_a_group_are_those_of_its_first_seed(page):
    shown = [alt for alt, _ in page.pictures if alt.startswith("Final samples of")]
    assert shown == [
        f"Final samples of {name}" for name in ("other<b>-seed0-steps1", "sfd-seed0-steps1", "sfd-seed0-steps4")
    ]


def test_differences_name_options_once_and_paths_not_at_all(page):
    (table,) = (table for table in page.tables if table[0][0] == "option" and table[1][0] == "seed")
    assert table[0][1:] == ["other<b>-seed0-steps1", "sfd-seed0-steps1", "sfd-seed0-steps4", "sfd-seed1-steps1"]
    assert {row[0]: row[1:] for row in table[1:]} == {
        "seed": ["0", "0", "0", "1"],
        "method.name": ["other<b>", "sfd", "sfd", "sfd"],
        "method.steps": ["1", "1", "4", "1"],
    }


def test_every_run_says_where_it_comes_from_and_what_is_missing_why(page, folder):
    (table,) = (table for table in page.tables if table[0][0] == "run")
    assert table[2] == ["sfd-seed0-steps1", *TRACE.values(), "unknown"]
    assert f"{folder}/runs/late-seed5-steps1: it is not complete; the command that started it resumes it" in page.text
    assert f"{folder}/runs/bad-seed6-steps1/metrics.json is damaged" in page.text


def record_with(**changes):
    def change(path):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps([stored[0] | changes, *stored[1:]]))

    return change


def text(content):
    return lambda path: path.write_text(content)


def linked(path):
    path.unlink()
    path.symlink_to(path.parents[2] / "secret")


DAMAGE = {
    "config.yaml": (text("method: {name: sfd}\nseed: x"), "is not the config of a run (seed is 'x')"),
    "./config.yaml": (text("method: {name: '${oc.env:HOME}'}"), "holds ${oc.env:HOME}, which is not resolved"),
    "metrics.json": (record_with(mean="0.1"), "is damaged or no list of metrics (mean is '0.1')"),
    "./metrics.json": (record_with(std=-0.1), "is damaged or no list of metrics (std must not be negative, got -0.1)"),
    "../x/metrics.json": (text("{}"), "is damaged or no list of metrics (it is empty)"),
    "evaluation/metrics.json": (text('[{"name": []}]'), "is damaged or no list of metrics (name is [])"),
    "student.json": (text('{"kimg": "48"}'), "is damaged (kimg is '48')"),
    "preparation.json": (text('{"steps": [], "images": 1, "seconds": 1}'), "is damaged (steps is [])"),
    "metrics.csv": (text("a,b\n1,\0"), "is damaged (it holds zero bytes)"),
    "samples.png": (linked, "is a link that leads out of"),
    "./samples.png": (text("<svg/>"), "is no PNG picture"),
}


def test_a_run_with_a_damaged_file_is_left_out_by_name_and_the_others_are_reported(tmp_path):
    (tmp_path / "secret").write_bytes(b"\x89PNG\r\n\x1a\nthe key to the cellar")
    good = run(tmp_path / "runs", 0, 0.3)
    lines = []
    for number, (name, (damage, message)) in enumerate(DAMAGE.items()):
        path = tmp_path / "runs" / f"damaged{number}"
        run(tmp_path / "runs", 1, 0.4).rename(path)
        file = path / Path(name).name if name.startswith(".") else path / name
        file.parent.mkdir(exist_ok=True)
        damage(file)
        lines.append(f"{file} {message}")
    said = write_report(tmp_path / "report.html", [f"{tmp_path}/runs/*"])
    assert said.endswith(f"report.html written: 1 runs, {len(DAMAGE)} left out")
    page = Page((tmp_path / "report.html").read_text())
    assert not [line for line in lines if line not in page.text]
    assert good.name in page.text
    assert not [png for _, png in page.pictures if b"cellar" in png]


def test_what_was_measured_while_training_went_on_is_no_result(tmp_path):
    """evaluate.py kept it in the run's folder, in the place of the final value of the same fingerprint."""
    path = run(tmp_path / "runs", 0, 0.3)
    half = [replace(r, training={"step": 4, "reached": 6, "total": 13}) for r in students({1: 0.9}, name=path.name)]
    final = [replace(r, training={"step": 4, "reached": 13, "total": 13}) for r in students({1: 0.31}, name=path.name)]
    for records, shown in ((half, "0.300 ± 0.020"), (final, "0.310 ± 0.020")):
        save_records(path / "evaluation/metrics.json", records)
        write_report(tmp_path / "report.html", [str(path)])
        page = Page((tmp_path / "report.html").read_text())
        assert [row[4] for row in page.tables[0] if row[0] == "sfd"] == [shown]
        left_out = f"{path}: evaluation/metrics.json has values after 4 of 13 training steps, left out"
        assert (left_out in page.text) is (records is half)


def test_a_report_is_replaced_but_nothing_else_is(tmp_path):
    write_measured(tmp_path / "runs/a", [*students({1: 0.3})])
    target = tmp_path / "report.html"
    write_report(target, [f"{tmp_path}/runs/*"])
    before = target.read_text()
    write_measured(tmp_path / "runs/b", [*students({1: 0.2}, name="b")], seed=1)
    write_report(target, [f"{tmp_path}/runs/*"])
    assert target.read_text() != before
    page = Page(target.read_text())
    assert page.foreign == []
    assert "no curve" in page.text  # nothing but the records is there
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my page</html>")
    with pytest.raises(ValueError, match=r"mine.html exists and is no report of this program; choose another name"):
        write_report(mine, [f"{tmp_path}/runs/*"])
    assert mine.read_text() == "<html>my page</html>"


def test_misuse(tmp_path):
    for wrong in (True, "report", tmp_path / "report.txt"):
        with pytest.raises(ValueError, match=r"is a web page; name it like target=report.html"):
            check_target(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="^cannot write .*/file/r.html: Not a directory"):
        check_target(tmp_path / "file/r.html")
    with pytest.raises(ValueError, match=r"^say of which runs: task=report 'run=\[runs/\*\]'$"):
        main(OmegaConf.create({"run": None, "target": "r.html"}))
    with pytest.raises(FileNotFoundError, match=r"run=nothing/\* names no run"):
        write_report(tmp_path / "r.html", ["nothing/*"])
    OmegaConf.save({"method": {"name": "x"}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"(?s)no complete run for a report.*it is not complete"):
        write_report(tmp_path / "r.html", [str(tmp_path)])
    assert not (tmp_path / "r.html").exists()


def test_runs_of_one_name_in_several_folders_have_a_column_each(tmp_path):
    for value, experiment in enumerate(("a", "b")):
        run(tmp_path / experiment, 0, 0.1 + value, method="sfd", steps=1 + value)
        (tmp_path / experiment / f"sfd-seed0-steps{1 + value}").rename(tmp_path / experiment / "seed0")
    run(tmp_path, 1, 0.3)
    write_report(tmp_path / "page.html", [f"{tmp_path}/a/*", f"{tmp_path}/b/*", f"{tmp_path}/sfd-*"])
    page = Page((tmp_path / "page.html").read_text())
    (table,) = (table for table in page.tables if table[0][0] == "option" and table[1][0] == "seed")
    assert table[0] == ["option", f"{tmp_path}/a/seed0", f"{tmp_path}/b/seed0", "sfd-seed1-steps1"]
    assert table[2] == ["method.steps", "1", "2", "1"]
    alone = [[row[0] for row in table[1:]] for table in page.tables]
    assert [f"{tmp_path}/a/seed0", f"{tmp_path}/b/seed0", "sfd-seed1-steps1"] in alone
