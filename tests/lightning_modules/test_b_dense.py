"""B-DENSE on its three hosts: one branch is the host, weights, what each branch learns, rounds, kept students, misuse."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from closed_forms import BranchingCorrected, Mixture, MixtureData, energy_distance, exact_teacher, fit
from lightning_modules import SFD, DenoisingStudent, ProgressiveDistillation
from lightning_modules.components.branches import weights_of_branches
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.solvers import euler
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks import branches_of

METHODS = {"sfd": SFD, "progressive": ProgressiveDistillation, "student": DenoisingStudent}
HOSTS = {"sfd": {"steps": 2}, "progressive": {"start_steps": 16}}
HOSTS |= {"student": {"loss": "l2", "pairs": 256, "held_out": 32, "dtype": "float32"}}


def method(host, tmp_path=None, kimg=0.384, lr=1e-3, batch_size=32, teacher=None, **options):
    """B-DENSE on this host; without branches, the host itself."""
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=BranchingCorrected)
    common = {"name": host, "batch_size": batch_size, "seed": 0, "kimg": kimg, "lr": lr} | HOSTS[host]
    if host == "student":
        common["store"] = str(tmp_path / "trajectories")
    return METHODS[host](teacher, **(common | options))


def trained(module, tmp_path, *callbacks, **options):
    return fit(module, MixtureData(module.batch_size), *callbacks, default_root_dir=tmp_path, **options)


def at_step(module, step):
    """The module outside of a fit, as if it had come so far."""
    module._trainer = SimpleNamespace(global_step=step, world_size=1, callbacks=[])
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def caught(module):
    """The list that the branches' mean losses of every training step go into."""
    kept, branch_loss = [], module.branch_loss

    def keep(losses):
        kept.append(losses.detach().mean(0))
        return branch_loss(losses)

    module.branch_loss = keep
    return kept


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


each_host = pytest.mark.parametrize("host", HOSTS)


# -- the host ---------------------------------------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("options", [{}, {"branch_fade": 0.5}, {"branch_auxiliary": 0.3}], ids=str)
def test_one_branch_is_the_host_bit_for_bit(tmp_path, host, options):
    plain, branched = method(host, tmp_path), method(host, tmp_path, branches=1, **options)
    before = copied(plain.student)
    for module in (plain, branched):
        trained(module, tmp_path)
    assert equal(copied(plain.student), copied(branched.student))
    assert not equal(copied(plain.student), before)


@each_host
def test_end_weights_train_the_end_point_as_the_host_does(tmp_path, host):
    """The other groups, without a gradient, stay as they were."""
    plain, branched = method(host, tmp_path), method(host, tmp_path, branches=2, branch_weights="end")
    groups = copied(branched.student)["network.last.weight"]
    for module in (plain, branched):
        trained(module, tmp_path)
    found = copied(branched.student)
    ours = plain.student.network.state_dict()
    for name, value in branched.exported().items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(found["network.last.weight"][2:], groups[2:])
    if host != "progressive":  # whose groups begin each round as the end point
        assert torch.equal(found["network.last.weight"][:2], groups[:2])


@pytest.mark.parametrize("host", ["sfd", "progressive"])
def test_with_auxiliary_weights_the_end_point_is_pulled_as_in_the_host(tmp_path, host):
    """The gradient of its own group of weights is the host's."""
    gradients = []
    for options in ({}, {"branches": 2, "branch_auxiliary": 0.3}, {"branches": 2}):
        module = method(host, tmp_path, **options)
        with torch.no_grad():
            for part in (module.student.network.layers, module.student.network.last):
                torch.manual_seed(1)
                for p in part.parameters():
                    p += 0.1 * torch.randn(2, *p.shape[1:]).repeat(len(p) // 2, *[1] * (p.dim() - 1))
        seen = []

        class Gradient(pl.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer, seen=seen):
                last = module.student.network.last
                seen.append([p.grad[-2:].clone() for p in (last.weight, last.bias)])

        trained(module, tmp_path, Gradient(), max_steps=1)
        gradients.append(seen[0])
    for ours, auxiliary, normalised in zip(*gradients, strict=True):
        torch.testing.assert_close(auxiliary, ours, rtol=0, atol=0)
        torch.testing.assert_close(normalised, ours / 2, rtol=0, atol=0)


# -- at the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "branches"), [("sfd", 4), ("progressive", 2), ("student", 4)])
def test_all_branches_start_as_the_teachers_estimate(tmp_path, host, branches):
    module = method(host, tmp_path, branches=branches)
    assert branches_of(module.student.network) == branches
    x = sample_noise(torch.arange(8), (2, 1, 1))
    for sigma in torch.tensor([80.0, 2.0, 0.05]):
        found = module.student.branches(sigma * x, sigma)
        expected = module.teacher.denoiser(sigma * x, sigma)
        assert found.shape == (8, branches, 2, 1, 1)
        assert torch.equal(found, expected[:, None].expand_as(found))


@pytest.mark.parametrize(("factor", "branches"), [(2, 2), (4, 4)])
def test_in_progressive_distillation_the_first_branch_has_nothing_to_learn_at_the_start(factor, branches):
    """With branches for all of the teacher's steps its target is the teacher's own estimate; the next ones' are not."""
    module = at_step(method("progressive", branches=branches, factor=factor), 0)
    module.on_fit_start()
    losses = caught(module)
    images = Mixture().sample(512, torch.Generator().manual_seed(0)).float()
    module.training_step({"image": images, "position": torch.arange(512)}, 0)
    assert losses[0].shape == (branches,)
    assert losses[0][0] < 1e-9
    assert (losses[0][1:] > 1e-3).all()
    assert (losses[0].diff() > 0).all()


def interval_losses(solver, interval):
    """Of an untrained student of K = 4 that stands on the teacher's path, the branches' losses in this interval."""
    module = at_step(method("sfd", branches=4, steps=3, afs=False, solver=solver), interval)
    module.on_fit_start()
    module.steps_under_way = 3
    random = TrainingNoise(0, torch.arange(64), (2, 1, 1))
    module.join(random.latents, None, 0)
    for _ in range(interval):
        module.x = module.next_states()[:, -1]
    losses = caught(module)
    module.training_step({"position": torch.arange(64) + interval * 32}, 0)
    return losses[0]


@pytest.mark.parametrize("interval", [0, 1, 2])
def test_in_sfd_the_first_branch_learns_what_the_solver_remembers(interval):
    """A solver that looks back has news for it but in the very first step; Euler, and the first step, have none."""
    plain, multistep = (interval_losses(solver, interval) for solver in ("euler", "dpm_solver_pp"))
    size = 80 * 0.02**interval  # of the states, about
    assert plain[0] < 1e-5 * size + 1e-6
    assert (plain[1:] > 1e-4).all()
    assert (multistep[1:] > 1e-4).all()
    if interval == 0:
        assert multistep[0] == plain[0]
    else:
        assert multistep[0] > 1e-3


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("end", [0, 0, 0, 1]),
        ("uniform", [0.25] * 4),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ("geometric", [0.019, 0.064, 0.212, 0.706]),
        ([1, 0, 2, 5], [0.125, 0, 0.25, 0.625]),
    ],
)
def test_weights_sum_to_one(weights, expected):
    found = weights_of_branches(weights, 4, None)
    assert found == pytest.approx(expected, abs=1e-3)
    assert sum(found) == pytest.approx(1)
    module = at_step(method("sfd", branches=4, branch_weights=weights), 0)
    assert module.branch_loss(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).item() == pytest.approx(
        sum(w * 10**k for k, w in enumerate(found)), rel=1e-5
    )


@pytest.mark.parametrize("branches", [2, 3, 4, 8])
def test_the_end_points_geometric_weight_is_about_seven_tenths(branches):
    assert weights_of_branches("geometric", branches, None)[-1] == pytest.approx(0.7, abs=0.07)
    assert weights_of_branches("geometric", 1, None) == [1]


def test_auxiliary_weights_come_on_top_of_the_end_points():
    assert weights_of_branches("uniform", 4, 0.3) == pytest.approx([0.1, 0.1, 0.1, 1])
    assert weights_of_branches("linear", 4, 1) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 1])
    assert weights_of_branches("uniform", 4, 0) == [0, 0, 0, 1]
    assert weights_of_branches("end", 4, 0) == [0, 0, 0, 1]
    assert weights_of_branches("end", 1, 0.3) == [1]


@pytest.mark.parametrize(
    ("auxiliary", "expected"),  # the factors of both branches
    [
        (None, {0: (0.5, 0.5), 3: (0.25, 0.75), 6: (0, 1), 9: (0, 1), 11: (0, 1)}),
        (0.4, {0: (0.4, 1), 3: (0.2, 1), 6: (0, 1), 9: (0, 1), 11: (0, 1)}),
    ],
)
def test_auxiliary_weights_fade_over_a_share_of_the_training(auxiliary, expected):
    module = method("sfd", branches=2, branch_auxiliary=auxiliary, branch_fade=0.5)
    assert module.total_steps == 12
    for step, factors in expected.items():
        losses = torch.tensor([3.0, 5.0], requires_grad=True)
        at_step(module, step).branch_loss(losses[None]).backward()
        assert losses.grad.tolist() == pytest.approx(factors)


def test_in_progressive_distillation_they_fade_in_every_round():
    module = method("progressive", branches=2, branch_fade=0.5, end_steps=4, kimg=0.512)
    assert module.ends == [8, 16]
    for number, step, left in ((0, 0, 1), (0, 2, 0.5), (0, 4, 0), (0, 7, 0), (1, 8, 1), (1, 10, 0.5), (1, 12, 0)):
        module.round = number
        losses = torch.tensor([3.0, 5.0], requires_grad=True)
        at_step(module, step).branch_loss(losses[None]).backward()
        assert losses.grad.tolist() == pytest.approx([left / 2, 1 - left / 2])


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "branches"), [("sfd", 4), ("progressive", 2), ("student", 2)])
def test_every_branchs_loss_is_logged(tmp_path, host, branches):
    module = method(host, tmp_path, branches=branches, branch_weights="linear")
    metrics = trained(module, tmp_path).callback_metrics
    losses = [metrics[f"loss/branch{k}"] for k in range(1, branches + 1)]
    assert {name for name in metrics if name.startswith("loss/branch")} == {
        f"loss/branch{k + 1}" for k in range(branches)
    }
    weights = weights_of_branches("linear", branches, None)
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    torch.testing.assert_close(metrics["loss/student"], total)


class Rounds(pl.Callback):
    """The networks at the first step of every round, and the student that the last one left."""

    def __init__(self):
        self.left, self.begun = {}, {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not optimizer.state:
            samples = module.sample(sample_noise(torch.arange(4), (2, 1, 1)))
            self.begun[module.round] = (copied(module.student), copied(module.guide), samples)

    def on_train_batch_end(self, trainer, module, *_):
        self.left[module.round] = copied(module.student)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """16 -> 4 -> 1 steps with four branches."""
    folder, diary = tmp_path_factory.mktemp("rounds"), Rounds()
    module = method("progressive", branches=4, factor=4, lr=1e-2)
    trainer = trained(module, folder, diary)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, diary, folder


def test_a_round_begins_with_all_branches_at_the_last_end_point(rounds):
    module, diary, _ = rounds
    left = diary.left[0]
    groups = left["network.last.weight"].unflatten(0, (4, 2))
    assert not any(torch.equal(groups[k], groups[3]) for k in range(3))  # they had learnt different things
    student, guide, _ = diary.begun[1]
    for name in ("network.last.weight", "network.last.bias"):
        groups = student[name].unflatten(0, (4, 2))
        assert torch.equal(groups, left[name].unflatten(0, (4, 2))[3].expand_as(groups))
        assert torch.equal(guide[name], groups[3])
    assert branches_of(module.guide.network) == 1
    body = [name for name in left if "last" not in name]
    assert all(torch.equal(left[name], student[name]) and torch.equal(left[name], guide[name]) for name in body)


def test_what_is_kept_is_plain_and_samples_the_same(rounds):
    module, _, folder = rounds
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    expected = module.sample(noise)
    teacher = exact_teacher(network=BranchingCorrected)
    teacher.denoiser.network.load_state_dict(module.exported())
    plain = method("progressive", factor=4, teacher=teacher)
    plain.round = 1
    assert torch.equal(plain.sample(noise), expected)
    for chosen in (method("progressive", factor=4), method("progressive", factor=4, branches=4)):
        chosen.choose_steps(1, folder)
        assert branches_of(chosen.student.network) == 1
        assert torch.equal(chosen.sample(noise), expected)


@pytest.mark.parametrize(("host", "branches"), [("sfd", 4), ("student", 4)])
def test_an_export_is_plain_and_samples_the_same(tmp_path, host, branches):
    module = method(host, tmp_path, branches=branches, lr=1e-2)
    trained(module, tmp_path)
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    teacher = exact_teacher(network=BranchingCorrected)
    teacher.denoiser.network.load_state_dict(module.exported())
    assert torch.equal(method(host, tmp_path, teacher=teacher).sample(noise), module.sample(noise))


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_repeats_an_uninterrupted_one(rounds, tmp_path, stop):
    """In a round, and where it has just ended (after 4 of 12 steps)."""
    whole, _, _ = rounds
    assert whole.ends == [4, 12]
    stopped, resumed = (method("progressive", branches=4, factor=4, lr=1e-2) for _ in range(2))
    trained(stopped, tmp_path, max_steps=stop).save_checkpoint(tmp_path / "stopped.ckpt")
    trained(resumed, tmp_path, resume=tmp_path / "stopped.ckpt")
    assert equal(copied(resumed.student), copied(whole.student))


def test_a_checkpoint_with_another_number_of_branches_is_refused(rounds, tmp_path):
    _, _, folder = rounds
    for branches in (1, 2):
        other = method("progressive", branches=branches, factor=4)
        message = (
            rf"does not fit this \w+: of another shape: student.network.last.bias \(8,\) instead of \({2 * branches},\)"
        )
        with pytest.raises(ValueError, match=message):
            trained(other, tmp_path, resume=folder / "last.ckpt")


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "options", "nfe", "factor", "precision"),
    [
        ("sfd", {"branches": 4, "kimg": 40, "lr": 5e-3, "batch_size": 128}, 2, 5, "32-true"),
        pytest.param("progressive", {"branches": 2, "factor": 2}, 1, 8, "32-true", marks=pytest.mark.slow),
        pytest.param("progressive", {"branches": 4, "factor": 4}, 1, 8, "bf16-mixed", marks=pytest.mark.slow),
        ("student", {"branches": 2, "kimg": 40, "lr": 3e-3, "batch_size": 128, "pairs": 2048}, 1, 8, "bf16-mixed"),
    ],
    ids=["sfd", "halving", "quartering in bf16-mixed", "student in bf16-mixed"],
)
def test_it_beats_the_teacher_at_its_number_of_steps(tmp_path, host, options, nfe, factor, precision):
    """In energy distance to the mixture; the teacher takes Euler steps over the student's own levels."""
    if host == "progressive":
        options = {"kimg": 128, "lr": 1e-2, "batch_size": 256, "long_rounds": 0, "clip": False} | options
    module = method(host, tmp_path, **options)
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    if host == "sfd":
        undistilled = module.sample(noise)
    else:
        *_, undistilled = euler(module.teacher.denoiser, 80 * noise.double(), module.teacher.sigmas(nfe))
    clip = 1.0 if host == "progressive" else None
    trained(module, tmp_path, gradient_clip_val=clip, precision=precision)
    assert module.nfe == nfe
    before, after = energy_distance(undistilled, real), energy_distance(module.sample(noise), real)
    assert before > 0.1
    assert after < before / factor


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 0}, "method.branches must be an integer of at least 1, got 0"),
        ({"branches": 3}, "method.branches=3 does not divide the 4 teacher steps inside a student step"),
        ({"branches": 8}, "method.branches=8 does not divide the 4 teacher steps"),
        (
            {"branch_weights": "cubic"},
            "method.branch_weights='cubic' is unknown; choose end, uniform, linear, geometric or 4 numbers",
        ),
        ({"branch_weights": [1, 2]}, r"method.branch_weights=\[1, 2\] must be 4 numbers for method.branches=4"),
        (
            {"branch_weights": [1, -1, 1, 1]},
            "must be 4 numbers for method.branches=4, none of them negative, the last one positive",
        ),
        ({"branch_weights": [1, 1, 1, 0]}, "the last one positive"),
        ({"branch_weights": []}, r"method.branch_weights=\[\] must be 4 numbers"),
        (
            {"branch_weights": "end", "branch_auxiliary": 0.3},
            "method.branch_auxiliary=0.3 .* needs method.branch_weights=end ",
        ),
        ({"branch_auxiliary": -1}, "method.branch_auxiliary=-1 must be null or not negative"),
        ({"branch_fade": 0}, r"method.branch_fade must lie in \(0, 1\], or be null, got 0"),
        ({"branch_fade": 1.5}, r"method.branch_fade must lie in \(0, 1\], or be null, got 1.5"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method("sfd", **({"branches": 4} | options))


def test_states_on_the_way_do_not_fit_into_bytes(tmp_path):
    module = method("student", tmp_path, branches=2, dtype="uint8")
    with pytest.raises(ValueError, match="dtype=uint8 holds end points alone .* set dtype to float16 or float32"):
        module.training_data(None)
    assert method("student", tmp_path, branches=2, dtype="float16").training_data(None).train_stores[0] is not None
    assert method("student", tmp_path, branches=1, dtype="uint8").training_data(None).train_stores[0] is not None
