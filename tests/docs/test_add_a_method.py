"""The complete example of "Add a method": consistency distillation, from a file and a YAML outside of the project."""

import json
from functools import partial

import pytest
import torch
from consistency_distillation import ConsistencyDistillation
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
from torch import nn

from closed_forms import CorrectedByLevel, Mixture, MixtureData, energy_distance, exact_teacher, fit
from stillhouse.diffusion.preconditioning import EDM, X0, Consistency, description_of, from_description
from stillhouse.diffusion.random_numbers import sample_noise

EXAMPLE = ROOT / "docs/examples/add_a_method"
OPTIONS = (f"--config-dir={EXAMPLE / 'conf'}", "method=consistency_distillation", *TINY)


def method(teacher, **options):
    torch.manual_seed(0)
    common = {"name": "cd", "batch_size": 256, "seed": 0, "kimg": 1.0, "lr": 1e-3}
    return ConsistencyDistillation(teacher, **(common | options))


def test_it_takes_one_file_and_one_yaml():
    assert len((EXAMPLE / "consistency_distillation.py").read_text().splitlines()) < 120
    files = [path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sorted(name for name in files if not name.endswith(".pyc")) == [
        "conf/method/consistency_distillation.yaml",
        "consistency_distillation.py",
    ]


# -- mathematics ------------------------------------------------------------------------------------------------------


def test_the_preconditioning_is_the_published_one_and_the_identity_at_the_lowest_level():
    """Song et al., appendix C, with sigma_data = 0.5."""
    sigma, low, data = torch.tensor([0.002, 0.01, 0.5, 80.0], dtype=torch.float64), 0.002, 0.5
    c = Consistency(EDM(data), low)(sigma)
    torch.testing.assert_close(c.skip, data**2 / ((sigma - low) ** 2 + data**2))
    torch.testing.assert_close(c.out, data * (sigma - low) / (sigma**2 + data**2).sqrt())
    assert (c.skip[0], c.out[0]) == (1, 0)
    again = from_description(json.loads(json.dumps(description_of(Consistency(EDM(0.3), 0.01)))))
    assert description_of(again) == {"name": "Consistency", "of": {"name": "EDM", "sigma_data": 0.3}, "sigma_min": 0.01}
    with pytest.raises(ValueError, match="X0 can't be read as a consistency function: at small noise"):
        Consistency(X0(), 0.002)


class Flow(nn.Module):
    """The exact consistency function of N(mean, std^2 I): along the teacher's path (x - mean) / sqrt(std^2 + sigma^2) stays."""

    def __init__(self, mean, std, sigma_min):
        super().__init__()
        self.mean, self.std, self.sigma_min = mean, std, sigma_min

    def forward(self, x, sigma, labels=None):
        shrunk = ((self.std**2 + self.sigma_min**2) / (self.std**2 + sigma**2)).sqrt()
        return self.mean + (x - self.mean) * shrunk[:, None, None, None]


def test_the_exact_consistency_function_has_no_loss_but_for_the_teachers_step():
    """Heun's local error falls with the third power of the step, its square with the sixth."""
    mean, std = torch.tensor([[0.4, -0.3]], dtype=torch.float64), 0.5
    losses = []
    for levels in (40, 80):
        module = method(exact_teacher(Mixture(mean, std)), levels=levels)
        module.student = module.target = Flow(mean[0].float()[:, None, None], std, module.sigma_min)
        batch = {"image": torch.randn(4096, 2, 1, 1) * std + mean[0].float()[:, None, None]}
        losses.append(module.loss(batch | {"position": torch.arange(4096)}).item())
    assert losses[0] < 1e-4
    assert losses[1] < losses[0] / 32


def test_the_target_network_is_the_students_average_and_gets_no_gradient():
    module = method(exact_teacher(network=CorrectedByLevel), target_decay=0.75, kimg=0.256)
    before = [p.clone() for p in module.target.parameters()]
    fit(module, MixtureData(256))
    for old, p, q in zip(before, module.target.parameters(), module.student.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, 0.75 * old + 0.25 * q)


@pytest.mark.slow
def test_it_learns_the_mixture_in_one_step_and_in_two():
    module = method(exact_teacher(network=CorrectedByLevel), kimg=128, middle=1.0)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, MixtureData(256))
    for nfe in (1, 2):
        module.choose_steps(nfe, None)
        assert module.nfe == nfe
        assert energy_distance(module.sample(noise), real) < 0.2 * before


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
    step = "consistency_distillation:ConsistencyDistillation.training_step"
    train(tmp_path, *OPTIONS, before=partial(in_call, step, 9, killed)).killed()
    train(tmp_path, *OPTIONS).ok()
    assert_same_run(tmp_path / RUN, uninterrupted / RUN)
    assert any("target" in name for name in read_checkpoint(tmp_path / RUN / "checkpoints/last.ckpt")["state_dict"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(uninterrupted, tmp_path):
    train(tmp_path, *OPTIONS, "trainer.devices=2", fresh=True).ok()
    ours, theirs = (leaves(read_checkpoint(f / RUN / "checkpoints/last.ckpt")) for f in (tmp_path, uninterrupted))
    compared = [path for path in theirs if path.startswith("/state_dict")]
    assert any("target" in path for path in compared)
    for path in compared:
        torch.testing.assert_close(ours[path], theirs[path], rtol=1e-4, atol=1e-5, msg=path)
    rows, expected = (read_csv(f / RUN / "metrics.csv") for f in (tmp_path, uninterrupted))
    for row, other in zip(rows, expected, strict=True):
        if row["loss/student"]:
            assert float(row["loss/student"]) == pytest.approx(float(other["loss/student"]), rel=1e-4)


def test_it_is_measured_at_one_and_two_evaluations_and_exported(uninterrupted, tmp_path):
    ended = evaluate(uninterrupted, f"run={RUN}", "steps=[1,2,3]").ok()
    assert "steps=3: the student takes 1, 2, and no other number" in ended.out
    records = read_json(uninterrupted / RUN / "evaluation/metrics.json")
    values = {record["nfe"]: record["values"] for record in records if record["subject"] == "student"}
    assert set(values) == {1, 2}
    assert values[1] != values[2]
    evaluate(uninterrupted, "task=export", f"run={RUN}", "steps=2", f"target={tmp_path / 'student'}").ok()
    stored = json.loads((tmp_path / "student/student/config.json").read_text())
    assert stored["sampling"]["solver"] == "renoising"
    assert stored["preconditioning"]["name"] == "Consistency"


@pytest.mark.slow
def test_it_is_swept_and_reported(tmp_path):
    train(tmp_path, "-m", *(o for o in OPTIONS if not o.startswith("name=")), "seed=0,1").ok()
    assert len(list(tmp_path.glob("runs/*/student.safetensors"))) == 2
    evaluate(tmp_path, "task=report", "run=[runs/*]", "target=report.html").ok()
    assert "consistency_distillation" in (tmp_path / "report.html").read_text()
