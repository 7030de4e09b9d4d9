"""B-DENSE's branches on their three hosts: weights, what each branch learns, rounds, kept students, exports, misuse."""

import pytest
import pytorch_lightning as pl
import torch

from callbacks import Clock
from closed_forms import BranchingCorrected, Mixture, MixtureData, energy_distance, exact_teacher, fit
from lightning_modules import SFD, DenoisingStudent, ProgressiveDistillation
from lightning_modules.components.branches import weights_of_branches
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.solvers import dpm_solver_pp, euler
from stillhouse.networks import branches_of

METHODS = {"sfd": SFD, "progressive": ProgressiveDistillation, "student": DenoisingStudent}
HOSTS = {"sfd": {"steps": 2}, "progressive": {"start_steps": 16}}
HOSTS |= {"student": {"loss": "l2", "pairs": 256, "held_out": 32, "dtype": "float32"}}


def method(host, tmp_path=None, kimg=None, lr=1e-3, batch_size=32, teacher=None, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=BranchingCorrected)
    common = {"name": host, "batch_size": batch_size, "seed": 0, "lr": lr} | HOSTS[host]
    common["kimg"] = kimg or (0.192 if host == "sfd" else 0.384)  # 12 updates
    if host == "student":
        common["store"] = str(tmp_path / "trajectories")
    return METHODS[host](teacher, **(common | options))


def trained(module, tmp_path, *callbacks, **options):
    """All of a run, in progressive distillation its rounds."""
    data = MixtureData(module.batch_size)
    for name, stage in module.stages().items():
        stage.gradient_clip = module.gradient_clip
        fit(stage, data, Clock(), *callbacks, default_root_dir=tmp_path / name, **options)
    return fit(module, data, *callbacks, default_root_dir=tmp_path, **options)


def first_stage(module):
    return next(iter(module.stages().values()), module)


class BranchLosses(pl.Callback):
    """The branches' mean losses in every update."""

    def __init__(self, module):
        self.seen, branch_loss = [], module.branch_loss

        def kept(losses):
            self.seen.append(losses.detach().mean(0))
            return branch_loss(losses)

        module.branch_loss = kept


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


each_host = pytest.mark.parametrize("host", HOSTS)


# -- the host ---------------------------------------------------------------------------------------------------------


@each_host
def test_the_end_points_weight_alone_trains_the_end_point_as_without_branches(tmp_path, host):
    """The other groups, without a gradient, stay as they were; with one branch no option of theirs has an effect."""
    plain, branched = method(host, tmp_path), method(host, tmp_path, branches=2, branch_weights="end")
    single = method(host, tmp_path, branches=1, branch_fade=0.5, branch_auxiliary=0.3)
    groups = copied(branched.student)["network.last.weight"]
    for number, module in enumerate((plain, branched, single)):
        trained(module, tmp_path / str(number))
    assert equal(copied(plain.student), copied(single.student))
    found = copied(branched.student)
    ours = plain.student.network.state_dict()
    for name, value in branched.exported().items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(found["network.last.weight"][2:], groups[2:])
    if host != "progressive":  # whose groups begin each round as the end point
        assert torch.equal(found["network.last.weight"][:2], groups[:2])


@pytest.mark.parametrize("host", ["sfd", "progressive"])
def test_with_auxiliary_weights_the_end_point_is_pulled_as_in_the_host(tmp_path, host):
    """The gradient of its own group of weights is the host's, in the first update."""
    gradients = []
    for options in ({}, {"branches": 2, "branch_auxiliary": 0.3}, {"branches": 2}):
        module = first_stage(method(host, tmp_path, **options))
        seen = []

        class Gradient(pl.Callback):
            def on_train_start(self, trainer, module):
                with torch.no_grad():
                    for part in (module.student.network.layers, module.student.network.last):
                        torch.manual_seed(1)
                        for p in part.parameters():
                            p += 0.1 * torch.randn(2, *p.shape[1:]).repeat(len(p) // 2, *[1] * (p.dim() - 1))

            def on_before_optimizer_step(self, trainer, module, optimizer, seen=seen):
                last = module.student.network.last
                seen.append([p.grad[-2:].clone() for p in (last.weight, last.bias)])

        fit(module, MixtureData(32), Gradient(), Clock(), default_root_dir=tmp_path / "rounds/8", max_steps=1)
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
    module = first_stage(method("progressive", branches=branches, factor=factor))
    module.table = module.levels()
    losses = BranchLosses(module).seen
    images = Mixture().sample(512, torch.Generator().manual_seed(0)).float()
    module.loss({"image": images, "position": torch.arange(512)})
    assert losses[0].shape == (branches,)
    assert losses[0][0] < 1e-9
    assert (losses[0][1:] > 1e-3).all()
    assert (losses[0].diff() > 0).all()


def interval_losses(solver):
    """Of an untrained student of K = 4 that is put on the teacher's path, the branches' losses in three intervals."""
    module = method("sfd", branches=4, steps=3, afs=False, solver=solver)
    grid, losses = module.grids[3], BranchLosses(module).seen
    x = sample_noise(torch.arange(64), (2, 1, 1)).double() * 80
    with torch.no_grad():
        path = torch.stack(
            [x, *{"euler": euler, "dpm_solver_pp": dpm_solver_pp}[solver](module.teacher.denoiser, x, grid)]
        )
        for first in (0, 4, 8):
            batch = {"x": path[first].float(), "target": path[first + 1 : first + 5].transpose(0, 1).float()}
            taus = grid[first + 1 : first + 5, None, None, None].float()
            module.interval_loss(batch, grid[first].float(), taus, [])
    return losses


def test_in_sfd_the_first_branch_learns_what_the_solver_remembers():
    """A solver that looks back has news for it but in the very first step; Euler, and the first step, have none."""
    plain, multistep = (interval_losses(solver) for solver in ("euler", "dpm_solver_pp"))
    for interval in range(3):
        size = 80 * 0.02**interval  # of the states, about
        assert plain[interval][0] < 1e-5 * size + 1e-6
        assert (plain[interval][1:] > 1e-4).all()
        assert (multistep[interval][1:] > 1e-4).all()
        assert multistep[interval][0] == plain[0][0] if interval == 0 else multistep[interval][0] > 1e-3


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
    losses = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    total = method("sfd", branches=4, branch_weights=weights).branch_loss(losses).item()
    assert total == pytest.approx(sum(w * 10**k for k, w in enumerate(found)), rel=1e-5)


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
    ("auxiliary", "expected"),  # the factors of both branches in the 12 steps of a training
    [
        (None, {0: (0.5, 0.5), 3: (0.25, 0.75), 6: (0, 1), 9: (0, 1), 11: (0, 1)}),
        (0.4, {0: (0.4, 1), 3: (0.2, 1), 6: (0, 1), 9: (0, 1), 11: (0, 1)}),
    ],
)
@pytest.mark.parametrize("host", ["sfd", "progressive"])
def test_auxiliary_weights_fade_over_a_share_of_the_training(monkeypatch, host, auxiliary, expected):
    """In progressive distillation of every round."""
    module = method(host, branches=2, branch_auxiliary=auxiliary, branch_fade=0.5)
    for step, factors in expected.items():
        for one in (first_stage(module), module):
            monkeypatch.setattr(type(one), "progress", step / 12)
            losses = torch.tensor([[3.0, 5.0]], requires_grad=True)
            one.branch_loss(losses).backward()
            assert losses.grad[0].tolist() == pytest.approx(factors)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "branches"), [("sfd", 4), ("progressive", 2), ("student", 2)])
def test_every_branchs_loss_is_logged(tmp_path, host, branches):
    module = method(host, tmp_path, branches=branches, branch_weights="linear")
    metrics = trained(module, tmp_path, log_every_n_steps=1).callback_metrics
    names = [f"loss/branch{k + 1}" for k in range(branches)]
    assert {name for name in metrics if name.startswith("loss/branch")} == set(names)
    weights = weights_of_branches("linear", branches, None)
    total = sum(w * metrics[name] for w, name in zip(weights, names, strict=True))
    torch.testing.assert_close(metrics["loss/student"], total)


class Rounds(pl.Callback):
    """The networks at the first step of every round, and the student that the last one left."""

    def __init__(self):
        self.left, self.begun = {}, {}

    def on_train_start(self, trainer, module):
        self.begun[module.steps] = (copied(module.student), copied(module.guide.denoiser))

    def on_train_end(self, trainer, module):
        self.left[module.steps] = copied(module.student)


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
    left = diary.left[4]
    groups = left["network.last.weight"].unflatten(0, (4, 2))
    assert not any(torch.equal(groups[k], groups[3]) for k in range(3))  # they had learnt different things
    student, guide = diary.begun[1]
    for name in ("network.last.weight", "network.last.bias"):
        groups = student[name].unflatten(0, (4, 2))
        assert torch.equal(groups, left[name].unflatten(0, (4, 2))[3].expand_as(groups))
        assert torch.equal(guide[name], groups[3])
    assert branches_of(module.guide.denoiser.network) == 1
    body = [name for name in left if "last" not in name]
    assert all(torch.equal(left[name], student[name]) and torch.equal(left[name], guide[name]) for name in body)


@pytest.mark.parametrize(("host", "branches"), [("sfd", 4), ("student", 4), ("progressive", 4)])
def test_an_export_is_plain_and_samples_the_same(rounds, tmp_path, host, branches):
    """So is what progressive distillation keeps of a round, with branches or without."""
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    if host == "progressive":
        module, _, folder = rounds
        expected = {}
        for chosen in (module, method(host, factor=4), method(host, factor=4, branches=4)):
            chosen.choose_steps(4, folder)
            expected[chosen] = chosen.sample(noise)
            assert torch.equal(expected[chosen], expected[module])
        options = {"factor": 4, "start_steps": 16, "end_steps": 4}
    else:
        module, options = method(host, tmp_path, branches=branches, lr=1e-2), {}
        trained(module, tmp_path)
    teacher = exact_teacher(network=BranchingCorrected)
    teacher.denoiser.network.load_state_dict(module.exported())
    assert torch.equal(method(host, tmp_path, teacher=teacher, **options).sample(noise), module.sample(noise))


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
        ("sfd", {"branches": 4, "kimg": 20, "lr": 5e-3, "batch_size": 128}, 2, 5, "32-true"),
        pytest.param("progressive", {"branches": 2, "factor": 2}, 1, 8, "32-true", marks=pytest.mark.slow),
        pytest.param("progressive", {"branches": 4, "factor": 4}, 1, 8, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(
            "student",
            {"branches": 2, "kimg": 40, "lr": 3e-3, "batch_size": 128, "pairs": 2048},
            1,
            8,
            "bf16-mixed",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sfd", "halving", "quartering in bf16-mixed", "student in bf16-mixed"],
)
@pytest.mark.slow
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
    module.gradient_clip = 1.0 if host == "progressive" else None
    trained(module, tmp_path, precision=precision)
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
