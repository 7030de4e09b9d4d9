"""evaluate.py: runs and teachers, in one table, with the values that training ended with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end_tools import ROOT, RUN, copied, evaluate, read_checkpoint, read_json, snapshot, with_data
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from stillhouse.analysis.tables import format_mean_std

TEACHER = (
    "teacher=digits",
    "teacher.weights=null",
    "teacher.network.model_channels=8",
    "num_samples=20",
    "blocks=2",
    "device=cpu",
)


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """Two runs, a1 and a2, of which the second has other weights, and a folder that is no run."""
    folder = copied(finished, tmp_path_factory.mktemp("evaluate"))
    (folder / RUN).rename(folder / "runs" / "a1")
    shutil.copytree(folder / "runs" / "a1", folder / "runs" / "a2")
    (folder / "runs" / "teacher-other").mkdir()
    best = folder / "runs/a2/checkpoints/best.ckpt"
    state = read_checkpoint(best)
    for value in state["callbacks"]["EMA"]["averages"]["ema_500kimg"].values():
        value.add_(0.1)
    torch.save(state, best)
    return folder


def test_a_run_measured_again_gives_the_same_values(finished, tmp_path):
    """As at the end of training, in another folder: nothing of the run itself changes."""
    copied(finished, tmp_path)
    shutil.rmtree(tmp_path / "data" / "measured")
    before = snapshot(tmp_path / RUN)
    evaluate(tmp_path, f"run={RUN}").ok()
    assert read_json(tmp_path / RUN / "evaluation/metrics.json") == read_json(finished / RUN / "metrics.json")
    assert before.items() <= snapshot(tmp_path / RUN).items()
    # The names hold a hash of the teacher's weights, random here: values seldom tell two such teachers apart.
    ours, theirs = ({path.name for path in (f / "data" / "measured").iterdir()} for f in (tmp_path, finished))
    assert len(ours) == 1
    assert ours < theirs  # which has the curve's line too
    for name in ("samples.png", "interpolation.png"):
        ours, theirs = (np.asarray(Image.open(f / name)) for f in (tmp_path / RUN / "evaluation", finished / RUN))
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_several_runs_share_one_table(folder):
    ended = evaluate(folder, "run=[runs/a2,runs/a*]", "metrics=[fid,is]", "num_samples=30", "blocks=1").ok()
    table = ended.out[ended.out.index("fingerprint") :].partition("\n\n")[0]
    assert table.count("fingerprint") == 1
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["digits", "a2", "a1", "digits"]
    assert {"fid_digits", "is_digits"} <= set(table.splitlines()[1].split())
    values = [read_json(folder / "runs" / name / "evaluation/metrics.json") for name in ("a1", "a2")]
    students = [next(r["mean"] for r in records if r["subject"] == "student") for records in values]
    assert students[0] != students[1]


def test_the_trained_weights_and_the_last_checkpoint_can_be_chosen(folder):
    for weights, checkpoint in (("raw", "last"), ("raw", "best"), ("null", "last")):
        evaluate(folder, "run=runs/a1", f"weights={weights}", f"checkpoint={checkpoint}", "num_samples=40").ok()
    records = read_json(folder / "runs/a1/evaluation/metrics.json")
    measured = [r for r in records if r["subject"] == "student" and r["fingerprint"]["num_samples"] == 40]
    assert [r["fingerprint"]["weights"] for r in measured] == [
        "raw",
        "ema_500kimg",
    ]  # the later "raw" replaced the first
    assert len({r["mean"] for r in measured}) == 2


def test_a_teacher_at_several_steps_and_by_another_solver(folder):
    ended = evaluate(folder, *TEACHER, "steps=[1,2]").ok()
    evaluate(folder, *TEACHER, "steps=2", "solver=euler").ok()
    for text in ("teacher (heun, 2 steps)", "teacher (heun)", "real"):
        assert text in ended.out
    records = read_json(folder / "runs/teacher-digits/metrics.json")
    teachers = [(r["solver"], r["steps"], r["nfe"]) for r in records if r["subject"] == "teacher"]
    assert teachers == [("heun", 1, 1), ("heun", 2, 3), ("euler", 2, 2)]
    for name in ("samples.png", "interpolation.png"):
        assert (folder / "runs/teacher-digits" / name).stat().st_size > 1000


@pytest.mark.slow
def test_values_do_not_depend_on_the_batch_size(finished, tmp_path):
    """One process at batches of 20, 7 and 1: the same seeds make the same samples."""
    records = []
    for size in (20, 7, 1):
        folder = with_data(finished, tmp_path / str(size), "measured")
        evaluate(folder, *TEACHER, "steps=2", "metrics=[fid,kid,is]", f"evaluation.batch_size={size}").ok()
        records.append(read_json(folder / "runs/teacher-digits/metrics.json"))
    for others in records[1:]:
        for record, other in zip(records[0], others, strict=True):
            assert record["values"] == pytest.approx(other["values"], rel=1e-5)
            assert record["fingerprint"] == other["fingerprint"]


CARD = ROOT / "pretrained" / "digits_teacher.json"


@pytest.mark.skipif(not CARD.exists(), reason="pretrained/digits_teacher is not there yet")
@pytest.mark.slow
def test_the_pretrained_teacher_is_what_its_card_says(finished, tmp_path):
    """The first of its blocks, measured again."""
    with_data(finished, tmp_path)
    evaluate(tmp_path, "teacher=digits", "blocks=1", "device=cpu").ok()
    (measured,) = (r for r in read_json(tmp_path / "runs/teacher-digits/metrics.json") if r["subject"] == "teacher")
    said = json.loads(CARD.read_text())["metrics"]["fid_digits/student"]  # what its training run exported
    assert measured["nfe"] == said["nfe"]
    assert measured["mean"] == pytest.approx(said["values"][0], rel=0.01)


def test_a_damaged_checkpoint_and_config_are_named(finished, tmp_path):
    copied(finished, tmp_path)
    best = tmp_path / RUN / "checkpoints" / "best.ckpt"
    content = read_checkpoint(best)
    best.write_bytes(best.read_bytes()[:5000])
    ended = evaluate(tmp_path, f"run={RUN}", "blocks=1").ok()
    assert "best.ckpt is damaged or cut short" in ended.out
    assert "Until then last.ckpt is taken" in ended.out
    shutil.rmtree(tmp_path / RUN / "evaluation")
    evaluate(tmp_path, f"run={RUN}", "checkpoint=best").refused(
        "runs/run/checkpoints/best.ckpt is damaged or cut short"
    )
    torch.save(content | {"run": {"method": "disback", "config": content["run"]["config"]}}, best)
    evaluate(tmp_path, f"run={RUN}").refused(
        "runs/run/checkpoints/best.ckpt is of another method (disback, and this run's is denoising_student)"
    )
    averages = content["callbacks"]["EMA"]["averages"]
    values = next(iter(averages.values()))
    key = max(values, key=lambda key: values[key].numel())
    values[key] = values[key][:-1].clone()
    del content["run"]  # as before checkpoints said whose they are
    torch.save(content, best)
    evaluate(tmp_path, f"run={RUN}").refused("runs/run/checkpoints/best.ckpt does not fit", "of another shape")
    config = tmp_path / RUN / "config.yaml"
    stored = OmegaConf.load(config)
    del stored["method"]
    OmegaConf.save(stored, config)
    evaluate(tmp_path, f"run={RUN}").refused("method")
    config.write_text("- 1")
    evaluate(tmp_path, f"run={RUN}").refused("runs/run/config.yaml is not the config of a run")
    assert not (Path(tmp_path) / RUN / "evaluation").exists()


def test_a_run_is_exported(folder):
    """With what its folder holds of these weights, and of no others."""
    evaluate(folder, "run=runs/a1", "weights=raw", "num_samples=30", "blocks=1", "device=cpu").ok()
    ended = evaluate(folder, "task=export", "run=runs/a1", "target=exports/a1").ok()
    assert ended.out == "exports/a1 written\n"
    card = (folder / "exports/a1/README.md").read_text()
    final, raw = (
        [r for r in read_json(folder / "runs/a1" / name) if r["subject"] == "student"]
        for name in ("metrics.json", "evaluation/metrics.json")
    )
    assert all(format_mean_std(r["mean"], r["std"]) in card for r in final)
    assert any(r["fingerprint"]["weights"] == "raw" for r in raw)
    assert "student (raw)" not in card
    weights = load_file(folder / "exports/a1/student.safetensors")
    trained = load_file(folder / "runs/a1/student.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in weights.items())
    ended = evaluate(folder, "task=export", "run=runs/a2", "target=exports/a2", "weights=raw", "checkpoint=last").ok()
    assert "not measured with these weights and steps" in ended.out
    assert "Not measured." in (folder / "exports/a2/README.md").read_text()
