"""The complete example of "Add a method": TRACT, from a file and a YAML outside of the project."""

import json
from functools import partial

import pytest
import torch
from end_to_end_tools import (
    ROOT,
    RUN,
    TINY,
    assert_same_run,
    die,
    evaluate,
    in_call,
    leaves,
    read_checkpoint,
    read_csv,
    read_json,
    train,
)
from tract import TRACT

from closed_forms import CorrectedByLevel, Mixture, MixtureData, energy_distance, exact_teacher, fit
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.solvers import euler_step

EXAMPLE = ROOT / "docs/examples/add_a_method"
OPTIONS = (f"--config-dir={EXAMPLE / 'conf'}", "method=tract", *TINY, "teacher.steps=4")


def method(teacher, **options):
    torch.manual_seed(0)
    common = {"name": "tract", "batch_size": 256, "seed": 0, "kimg": 1.0, "lr": 1e-3}
    return TRACT(teacher, **(common | options))


def test_it_takes_one_file_and_one_yaml():
    assert len((EXAMPLE / "tract.py").read_text().splitlines()) < 120
    files = [path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sorted(name for name in files if not name.endswith(".pyc")) == ["conf/method/tract.yaml", "tract.py"]


# -- mathematics ------------------------------------------------------------------------------------------------------


def test_a_step_to_the_target_arrives_where_the_teachers_short_steps_do():
    """With the teacher as the average, in segments of two: exactly; at a segment's last level by the teacher's step alone."""
    teacher = exact_teacher(steps=8)
    module, x = method(teacher, steps=4), torch.randn(6, 2, 1, 1, dtype=torch.float64)
    for level in range(8):
        end = level // 2 * 2 + 2
        t, following, s = (module.sigmas[i].expand(6) for i in (level, level + 1, end))
        state = x * t[0]
        for i in range(level, end):
            state = euler_step(state, teacher.denoiser(state, module.sigmas[i]), module.sigmas[i], module.sigmas[i + 1])
        target = module.target(x * t[0], t, following, s, None)
        torch.testing.assert_close(euler_step(x * t[0], target, t[0], s[0]), state, rtol=1e-6, atol=1e-6)


def test_the_average_follows_the_student_and_gets_no_gradient():
    module = method(exact_teacher(network=CorrectedByLevel), average_decay=0.75, kimg=0.256)
    before = [p.clone() for p in module.average.parameters()]
    fit(module, MixtureData(256))
    for old, p, q in zip(before, module.average.parameters(), module.student.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, 0.75 * old + 0.25 * q)


@pytest.mark.parametrize("steps", [3, 16])
def test_segments_must_divide_the_teachers_steps(steps):
    with pytest.raises(ValueError, match=f"method.steps={steps} must divide the teacher's 16 steps into several each"):
        method(exact_teacher(), steps=steps)


@pytest.mark.slow
def test_it_learns_the_mixture_in_few_steps():
    teacher = exact_teacher(network=CorrectedByLevel, solver="euler")
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    module = method(teacher, kimg=64, lr=5e-3)
    before = energy_distance(module.sample(noise), real)
    fit(module, MixtureData(256))
    assert energy_distance(module.sample(noise), real) < 0.4 * before


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, *OPTIONS).ok()
    return folder


def killed(original, *args, **kwargs):
    die()


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one_with_its_target_network(uninterrupted, tmp_path):
    step = "tract:TRACT.training_step"
    train(tmp_path, *OPTIONS, before=partial(in_call, step, 9, killed)).killed()
    train(tmp_path, *OPTIONS).ok()
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)
    assert any("average" in name for name in read_checkpoint(tmp_path / RUN / "checkpoints/last.ckpt")["state_dict"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(uninterrupted, tmp_path):
    train(tmp_path, *OPTIONS, "trainer.devices=2", fresh=True).ok()
    ours, theirs = (leaves(read_checkpoint(f / RUN / "checkpoints/last.ckpt")) for f in (tmp_path, uninterrupted))
    compared = [path for path in theirs if path.startswith("/state_dict")]
    assert any("average" in path for path in compared)
    for path in compared:
        torch.testing.assert_close(ours[path], theirs[path], rtol=1e-4, atol=1e-5, msg=path)
    rows, expected = (read_csv(f / RUN / "metrics.csv") for f in (tmp_path, uninterrupted))
    for row, other in zip(rows, expected, strict=True):
        if row["loss/student"]:
            assert float(row["loss/student"]) == pytest.approx(float(other["loss/student"]), rel=1e-4)


def test_it_is_measured_at_its_number_of_evaluations_and_exported(uninterrupted, tmp_path):
    ended = evaluate(uninterrupted, f"run={RUN}", "steps=[2,3]").ok()
    assert "steps=3: the student takes 2, and no other number" in ended.out
    records = read_json(uninterrupted / RUN / "evaluation/metrics.json")
    assert {record["nfe"] for record in records if record["subject"] == "student"} == {2}
    evaluate(uninterrupted, "task=export", f"run={RUN}", f"target={tmp_path / 'student'}").ok()
    stored = json.loads((tmp_path / "student/student/config.json").read_text())
    assert stored["sampling"]["solver"] == "euler"
    assert len(stored["sampling"]["sigmas"]) == 3


@pytest.mark.slow
def test_it_is_swept_and_reported(tmp_path):
    train(tmp_path, "-m", *(o for o in OPTIONS if not o.startswith("name=")), "seed=0,1").ok()
    assert len(list(tmp_path.glob("runs/*/student.safetensors"))) == 2
    evaluate(tmp_path, "task=report", "run=[runs/*]", "target=report.html").ok()
    assert "tract" in (tmp_path / "report.html").read_text()
