"""What evaluate.py can't do: one clear line, before anything is measured or written; and what it leaves out with a line."""

import shutil
from functools import partial

import pytest
from end_to_end_tools import RUN, STUDENT, copied, evaluate, in_call, read_json, snapshot, train, with_data
from omegaconf import OmegaConf
from page_tools import Page
from permission_tools import bound_by_permissions

SMALL = ("num_samples=20", "blocks=1", "device=cpu")
WEIGHTLESS = "teacher=digits teacher.weights=null"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Two complete runs, some with a damaged or foreign config, and folders and files that are no run."""
    folder = copied(finished, tmp_path_factory.mktemp("misuse_evaluate"))
    (folder / RUN).rename(folder / "runs/a1")
    shutil.copytree(folder / "runs/a1", folder / "runs/a2")
    (folder / "runs/teacher-other").mkdir()
    (folder / "mine.html").write_text("mine")
    (folder / "file").write_text("a file")
    stored = OmegaConf.load(folder / "runs/a1/config.yaml")
    configs = {
        "empty": "",
        "list": "- 1",
        "secret": "method: {name: '${oc.env:HOME}'}",
        "half": OmegaConf.to_yaml(OmegaConf.masked_copy(stored, ["method", "seed", "name"])),
        "foreign": OmegaConf.to_yaml(OmegaConf.merge(stored, {"data": {"_target_": "shutil.copy", "src": "file"}})),
    }
    for name, text in configs.items():
        (folder / f"odd/{name}").mkdir(parents=True)
        (folder / f"odd/{name}/config.yaml").write_text(text)
        shutil.copytree(folder / "runs/a1/checkpoints", folder / f"odd/{name}/checkpoints")
    (folder / "odd/cut").mkdir()
    shutil.copytree(folder / "runs/a1", folder / "odd/cut", dirs_exist_ok=True)
    best = folder / "odd/cut/checkpoints/best.ckpt"
    best.write_bytes(best.read_bytes()[:5000])
    for name in ("evaluation", "quality"):
        shutil.copytree(folder / "runs/a1", folder / f"odd/blocked-{name}")
    (folder / "odd/blocked-evaluation/evaluation").write_text("a file where a folder should be")
    (folder / "odd/blocked-quality/evaluation/quality.png").mkdir(parents=True)
    shutil.copytree(folder / "runs/a1", folder / "odd/again[2]")
    (folder / "odd/again[2]/evaluation").mkdir(exist_ok=True)
    (folder / "odd/again[2]/evaluation/metrics.json").write_text("[{")
    return folder


REPORT = "task=report run=[runs/*]"
EXPORT = "task=export run=runs/a1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # what to measure
        ("", ["evaluate: say what to measure: run=runs/NAME", "teacher=NAME", "flows=[NAME,NAME]", "--help"]),
        ("run=runs/none", ["run=runs/none names no run", "config.yaml"]),
        ("run=runs/teacher-other", ["run=runs/teacher-other names no run"]),
        ("run=[runs/a1,runs/b*]", ["run=runs/b* names no run"]),
        ("run=5", ["run=5 names no run"]),
        ("run=true", ["run=True must be a name or a list of some, such as 'run=[runs/A,runs/B*]'"]),
        ("run=[]", ["run=[] must be a name or a list of some"]),
        ("run=[[runs/a1]]", ["run=[['runs/a1']] must be a name or a list of some"]),
        ("run={a:1}", ["run={'a': 1} must be a name or a list of some"]),
        # how
        ("run=runs/a1 steps=3", ["steps=3: the student takes 1, and no other number"]),
        ("run=runs/a1 steps=true", ["steps=True must be whole numbers from 1 on"]),
        ("run=runs/a1 weights=ema_0.5", ["ema_0.5", "ema_500kimg"]),
        ("run=runs/a1 weights=5", ["5", "ema_500kimg"]),
        ("run=runs/a1 checkpoint=first", ["no checkpoint at runs/a1/checkpoints/first.ckpt"]),
        ("run=runs/a1 num_samples=5", ["num_samples must be a whole number of at least 10, got 5"]),
        ("run=runs/a1 metrics=[lpips]", ["metrics lpips are unknown; choose among fid"]),
        ("run=runs/a1 device=abacus", ["device=abacus", "cpu"]),
        ("teacher=digits teacher.weights=gone.safetensors", ["no weights at", "gone.safetensors"]),
        (f"{WEIGHTLESS} steps=0", ["steps=0 must be whole numbers from 1 on"]),
        (f"{WEIGHTLESS} steps=few", ["steps=few must be whole numbers from 1 on"]),
        (f"{WEIGHTLESS} steps=[]", ["steps=[] must be whole numbers from 1 on"]),
        (f"{WEIGHTLESS} steps=true", ["steps=True must be whole numbers from 1 on"]),
        (f"{WEIGHTLESS} solver=dpm", ["teacher.solver='dpm' is unknown"]),
        (f"{WEIGHTLESS} evaluation=none", ["evaluation=none measures nothing: choose another one"]),
        (f"{WEIGHTLESS} evaluation=points", ["the points extractor reads uint8 images (N, 2, 1, 1)", "(1, 1, 8, 8)"]),
        # what the task does not have
        (
            "run=runs/a1 teacher=digits",
            ["there is no option run of task=teacher; it is of task=export, task=report, task=runs"],
        ),
        ("run=runs/a1 solver=euler", ["there is no option solver of task=runs; it is of task=teacher"]),
        (
            "run=runs/a1 data=cifar10",
            ["no option data of task=runs; it is of task=flows, task=self_test, task=teacher"],
        ),
        ("run=runs/a1 +solver=euler", ["solver is unknown: task=runs takes "]),
        ("run=runs/a1 +evaluation=pixels", ["say evaluation=NAME, without +"]),
        ("run=runs/a1 check=true", ["check is a task of its own: python evaluate.py task=self_test teacher=NAME"]),
        ("run=runs/a1 export=b", ["export is a task of its own: python evaluate.py task=export run=runs/NAME target="]),
        ("run=runs/* report=r.html", ["report is a task of its own: python evaluate.py task=report 'run=[runs/*]'"]),
        (
            "task=self_test teacher=digits num_samples=20",
            ["no option num_samples of task=self_test; it is of task=flows"],
        ),
        ("task=self_test", ["teacher is missing: task=self_test needs it; say teacher=NAME (conf/teacher)"]),
        (f"{WEIGHTLESS} weigths=raw", ["there is no option weigths"]),
        ("task=expert run=runs/a1", ["task=expert is not among conf/task; did you mean export"]),
        # which run
        ("task=export run=runs/a* target=b", ["export is for the student of one run, at one number of steps"]),
        ("task=export run=runs/a1", ["say which run's student, and where to: task=export run=runs/NAME target=FOLDER"]),
        ("task=report", ["say of which runs: task=report 'run=[runs/*]'"]),
        # where to write
        (
            "run=odd/blocked-evaluation",
            ["cannot write odd/blocked-evaluation/evaluation/metrics.json: Not a directory"],
        ),
        ("run=odd/blocked-quality", ["cannot write odd/blocked-quality/evaluation/quality.png: it is a folder"]),
        # found before the first run is measured
        ("run=[runs/a1,'odd/again[2]']", ["odd/again[2]/evaluation/metrics.json is damaged or no list of metrics"]),
        ("run=[runs/a1,runs/a2] comparison=file", ["cannot write file/convergence.json: Not a directory"]),
        ("run=[runs/a1,runs/a2] comparison=true", ["comparison=True must be the name of a file or folder"]),
        (f"{EXPORT} target=true", ["target=True must be the name of a file or folder"]),
        (f"{EXPORT} target=file/a1", ["cannot write file/a1: Not a directory"]),
        (f"{EXPORT} target=runs/a2", ["target=runs/a2 exists already"]),
        (f"{REPORT} target=true", ["target=True must be the name of a file or folder"]),
        (f"{REPORT} target=page", ["target=page is a web page; name it like target=report.html"]),
        (f"{REPORT} target=mine.html", ["target=mine.html exists and is no report of this program"]),
        (f"{REPORT} target=file/r.html", ["cannot write file/r.html: Not a directory"]),
        ("task=report run=runs/none*", ["run=runs/none* names no run"]),
        ("task=report run=[]", ["run=[] must be a name or a list of some"]),
        # runs that are damaged, or from elsewhere
        ("run=odd/empty", ["odd/empty/config.yaml is not the config of a run (it is empty)"]),
        ("run=odd/list", ["odd/list/config.yaml is not the config of a run (it is a list)"]),
        ("run=odd/half", ["odd/half/config.yaml lacks data, evaluation"]),
        ("run=odd/secret", ["odd/secret/config.yaml holds ${oc.env:HOME}, which is not resolved"]),
        ("run=odd/cut checkpoint=best", ["odd/cut/checkpoints/best.ckpt is damaged or cut short"]),
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


def test_an_extractor_that_can_not_read_the_data_is_refused_before_pairs_are_sampled(tmp_path):
    ended = train(tmp_path, *STUDENT, "evaluation=points")
    ended.refused("the points extractor reads uint8 images (N, 2, 1, 1), got torch.uint8 (1, 1, 8, 8)")
    assert not (tmp_path / "data/trajectories").exists()


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
