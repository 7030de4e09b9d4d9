"""What evaluate.py can't do: one clear line, before anything is measured or written; and what it leaves out with a line.

Of the refusals here is a case of each kind of place from which they come; the other messages are in
launch/test_refused_command_lines.py, launch/test_options.py and the tests of launch/evaluate.
"""

import shutil
from functools import partial

import pytest
from end_to_end_tools import RUN, STUDENT, copied, evaluate, in_call, read_json, snapshot, train, with_data
from page_tools import Page
from permission_tools import bound_by_permissions

SMALL = ("num_samples=20", "blocks=1", "device=cpu")
WEIGHTLESS = "teacher=digits teacher.weights=null"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Two complete runs, some that are damaged, and files that are no run."""
    folder = copied(finished, tmp_path_factory.mktemp("misuse_evaluate"))
    (folder / RUN).rename(folder / "runs/a1")
    shutil.copytree(folder / "runs/a1", folder / "runs/a2")
    (folder / "mine.html").write_text("mine")
    (folder / "file").write_text("a file")
    for name, text in (("empty", ""), ("list", "- 1")):
        (folder / f"odd/{name}").mkdir(parents=True)
        (folder / f"odd/{name}/config.yaml").write_text(text)
        shutil.copytree(folder / "runs/a1/checkpoints", folder / f"odd/{name}/checkpoints")
    (folder / "odd/cut").mkdir()
    shutil.copytree(folder / "runs/a1", folder / "odd/cut", dirs_exist_ok=True)
    best = folder / "odd/cut/checkpoints/best.ckpt"
    best.write_bytes(best.read_bytes()[:5000])
    shutil.copytree(folder / "runs/a1", folder / "odd/again[2]")
    (folder / "odd/again[2]/evaluation").mkdir(exist_ok=True)
    (folder / "odd/again[2]/evaluation/metrics.json").write_text("[{")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # what the command does not say, or the task does not have
        ("", ["evaluate: say what to measure: run=runs/NAME", "teacher=NAME", "flows=[NAME,NAME]", "--help"]),
        ("run=runs/a1 check=true", ["check is a task of its own: python evaluate.py task=self_test teacher=NAME"]),
        ("run=runs/a1 +solver=euler", ["evaluate: solver is unknown: task=runs takes "]),
        ("task=self_test", ["teacher is missing: task=self_test needs it; say teacher=NAME (conf/teacher)"]),
        # which run, and how
        ("run=runs/none", ["evaluate: run=runs/none names no run", "config.yaml"]),
        (
            "run=[runs/a1,runs/a2] num_samples=5",
            ["num_samples must be a whole number of at least 10, got 5", "; runs/a2: "],
        ),
        # where to write, found before the first run is measured
        ("run=[runs/a1,'odd/again[2]']", ["odd/again[2]/evaluation/metrics.json is damaged or no list of metrics"]),
        ("run=[runs/a1,runs/a2] comparison=file", ["cannot write file/convergence.json: Not a directory"]),
        ("task=export run=runs/a1 target=runs/a2", ["target=runs/a2 exists already"]),
        ("task=report run=[runs/*] target=mine.html", ["target=mine.html exists and is no report of this program"]),
        # runs that are damaged, or from elsewhere
        (
            "run=[odd/cut,odd/empty] checkpoint=best",
            ["odd/cut/checkpoints/best.ckpt is damaged", "; odd/empty/config.yaml is not the config"],
        ),
    ],
)
def test_misuse(folder, options, message):
    before = snapshot(folder)
    evaluate(folder, *options.split()).refused("error: ", *message)
    assert snapshot(folder) == before


def test_a_run_that_can_not_be_measured_does_not_keep_others_from_it(folder, tmp_path):
    copied(folder, tmp_path)
    shutil.copytree(folder / "odd", tmp_path / "odd")
    ended = evaluate(tmp_path, "run=[odd/cut,runs/a1,odd/list]", "checkpoint=best", "comparison=null", *SMALL).ok()
    said = [line for line in ended.out.splitlines() if line.startswith("not measured: ")]
    assert len(said) == 2
    assert "odd/cut/checkpoints/best.ckpt is damaged or cut short" in said[0]
    assert "odd/list/config.yaml is not the config of a run" in said[1]
    assert "student (ema_500kimg)" in ended.out


def test_a_read_only_run_is_refused_before_it_is_measured(folder, tmp_path):
    copied(folder, tmp_path)
    for place in (tmp_path / "runs/a1", tmp_path / "runs"):
        place.chmod(0o555)
    try:
        ended = evaluate(tmp_path, "run=runs/a1", *SMALL, before=bound_by_permissions)
        ended.refused("cannot write runs/a1/evaluation/metrics.json: Permission denied")
        ended = evaluate(tmp_path, *WEIGHTLESS.split(), *SMALL, before=bound_by_permissions)
        ended.refused("cannot write runs/teacher-digits/metrics.json: Permission denied")
    finally:
        for place in (tmp_path / "runs/a1", tmp_path / "runs"):
            place.chmod(0o755)


def full(original, path, data):
    raise OSError(f"cannot write {path}: no space")


def of_a2(path, data):
    return "a2" in str(path)


def test_the_table_is_printed_where_writing_fails(folder, tmp_path):
    """Of everything that was measured before it."""
    copied(folder, tmp_path)
    broken = partial(in_call, "stillhouse.metrics.records:write_ordered_json", 1, full, of_a2)
    ended = evaluate(tmp_path, "run=[runs/a1,runs/a2]", *SMALL, before=broken)
    ended.refused("cannot write runs/a2/evaluation/metrics.json: no space")
    rows = [line.split()[:2] for line in ended.out[ended.out.index("fingerprint") :].splitlines()]
    assert [row for row in rows if row[1:] == ["student"]] == [["a1", "student"], ["a2", "student"]]


@pytest.mark.slow
def test_a_finished_training_does_not_end_at_a_cache_that_can_not_be_written(finished, tmp_path):
    with_data(finished, tmp_path, "measured", "statistics")
    (tmp_path / "data/measured").write_text("a file where a folder should be")
    (tmp_path / "data/statistics").write_text("a file where a folder should be")
    ended = train(tmp_path, *STUDENT).ok()
    for name in ("measured", "statistics"):
        assert f"warning: cannot write data/{name}/" in ended.err
    assert read_json(tmp_path / RUN / "metrics.json") == read_json(finished / RUN / "metrics.json")


def stop(original, *args):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_unfinished_run_is_marked_and_its_values_are_no_result(finished, tmp_path):
    with_data(finished, tmp_path)
    train(tmp_path, *STUDENT, before=partial(in_call, "lightning_modules:DenoisingStudent.training_step", 8, stop))
    ended = evaluate(tmp_path, f"run={RUN}", "device=cpu").ok()
    evaluate(tmp_path, "task=export", f"run={RUN}", "target=half").ok()
    assert "| training | 4 of 13 steps of 16 images, seed 0 |" in (tmp_path / "half/README.md").read_text()
    assert "student (ema_500kimg, after 4 of 13 training steps)" in ended.out
    (half,) = (r for r in read_json(tmp_path / RUN / "evaluation/metrics.json") if r["subject"] == "student")
    assert half["training"] == {"step": 4, "reached": 6, "total": 13}
    train(tmp_path, *STUDENT).ok()
    evaluate(tmp_path, "task=report", f"run={RUN}", "target=r.html").ok()
    page = Page((tmp_path / "r.html").read_text())
    assert "evaluation/metrics.json has values after 4 of 13 training steps, left out" in page.text
    (final,) = (r for r in read_json(tmp_path / RUN / "metrics.json") if r["subject"] == "student")
    (row,) = (row for row in page.tables[0] if row[0] == "denoising_student")
    assert float(row[4].split()[0]) == pytest.approx(final["mean"], rel=1e-2)
    assert half["mean"] != pytest.approx(final["mean"], rel=2e-2)
    evaluate(tmp_path, f"run={RUN}", "device=cpu").ok()  # measured again it takes the old one's place
    assert read_json(tmp_path / RUN / "evaluation/metrics.json") == read_json(tmp_path / RUN / "metrics.json")
