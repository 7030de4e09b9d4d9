import pytest
import torch
from flow_tools import COMMON, Nothing, mixture_flow

from closed_forms import MEANS, Mixture, energy_distance, exact_teacher, fit
from lightning_modules import BezierDistillation, FlowDistillation, Reflow
from stillhouse.diffusion import bezier
from stillhouse.diffusion.random_numbers import HELD_OUT_SEEDS, sample_noise
from stillhouse.diffusion.time_distributions import Start, StartOrLater, Uniform

PAIRS = {"pairs": 2048, "held_out": 256, "dtype": "float32"}


def teachers(count=2):
    """Flows of the same mixture, turned a little against each other, as reflows of one flow are."""
    turns = [0.0, 0.15, 0.3][:count]
    turned = [
        MEANS @ torch.tensor([[torch.cos(a), -torch.sin(a)], [torch.sin(a), torch.cos(a)]], dtype=torch.float64)
        for a in torch.tensor(turns)
    ]
    return [mixture_flow(means, f"flow{i}") for i, means in enumerate(turned)]


def method(folder, flows=None, **options):
    common = {
        "name": "bezier",
        "order": 2,
        "slot": "endpoint",
        "weights": None,
        "final_weights": None,
        "end_row": "one_hot",
        "shuffled": False,
        "prediction": 1.0,
        "prediction_times": StartOrLater(0.25),
        "drift": 0.0,
        "drift_times": Uniform(),
        "shared": False,
        "store": str(folder / "trajectories"),
    }
    return BezierDistillation(teachers() if flows is None else flows, **(COMMON | PAIRS | common | options))


def latents(count=512):
    return sample_noise(torch.arange(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count), (2, 1, 1))


def trained(module):
    losses = []
    module.log = lambda name, value, **kwargs: losses.append(value.item()) if name == "loss/student" else None
    fit(module, None)
    return module.student.state_dict(), losses


def assert_same(ours, theirs):
    (state, losses), (other, others) = ours, theirs
    assert losses == others
    assert len(losses) == 32
    assert all(torch.equal(state[key], other[key]) for key in state)


# -- the special cases ---------------------------------------------------------------------------------------------


def test_one_teacher_and_order_one_is_rectified_flows_distillation_bit_for_bit(tmp_path):
    ours = method(tmp_path, teachers(1), order=1, prediction_times=Start(), kimg=4)
    theirs = FlowDistillation(
        teachers(1)[0], name="f", store=str(tmp_path / "trajectories"), **(COMMON | PAIRS | {"kimg": 4})
    )
    assert_same(trained(ours), trained(theirs))


def test_its_drift_fit_is_reflow_bit_for_bit(tmp_path):
    ours = method(tmp_path, teachers(1), order=1, prediction=0.0, drift=1.0, kimg=4)
    options = COMMON | PAIRS | {"kimg": 4, "times": Uniform()}
    theirs = Reflow(teachers(1)[0], name="r", store=str(tmp_path / "trajectories"), **options)
    assert_same(trained(ours), trained(theirs))
    torch.testing.assert_close(ours.sample(latents(16)), theirs.sample(latents(16)), rtol=0, atol=0)
    assert ours.nfe == theirs.nfe == 31


def test_linear_slots_give_the_losses_of_a_straight_path(tmp_path):
    options = {"drift": 0.5, "prediction_times": Uniform(), "kimg": 4, "end_row": "average"}
    straight = method(tmp_path, order=1, weights=[[0.3, 0.7]], **options)
    _, expected = trained(straight)
    for order in (2, 3, 5):
        _, losses = trained(method(tmp_path, order=order, weights=[[0.3, 0.7]] * order, slot="linear", **options))
        assert losses == pytest.approx(expected, rel=2e-3)
        assert losses[0] == pytest.approx(expected[0], rel=1e-5)


def test_without_later_times_inner_control_points_do_not_enter(tmp_path):
    """methods.md 4.5, fact 1: at t = 0 the input is x_0 and the target P_n."""
    runs = [
        trained(method(tmp_path, kimg=4, prediction_times=Start(), **options))
        for options in ({}, {"shuffled": True}, {"slot": "trajectory"}, {"slot": "linear"})
    ]
    for other in runs[:2]:
        assert_same(runs[0], other)
    # Trajectory slots bend the teacher's schedule, so their ends differ a little; linear ones have the same ends.
    assert_same(runs[0], runs[3])
    assert runs[2][1][0] == pytest.approx(runs[0][1][0], rel=0.05)


# -- learning --------------------------------------------------------------------------------------------------------


def held_out_error(module):
    error = module.sample(latents()) - module.teacher.sample(latents())
    return error.square().flatten(1).sum(1).mean().item()


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"order": 3, "slot": ["endpoint", "trajectory"]}, "32-true"),
        pytest.param({"order": 2, "drift": 0.3}, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(
            {"order": 2, "weights": [[1, 0], [0.5, 0.5]], "final_weights": [[1, 0], [0, 1]]},
            "32-true",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cubic", "joint in bf16-mixed", "schedule"],
)
@pytest.mark.slow
def test_it_learns_the_last_teachers_map_in_one_step(tmp_path, options, precision):
    module = method(tmp_path, kimg=60, **options)
    before = held_out_error(module)
    fit(module, None, precision=precision)
    assert module.nfe == 1
    assert held_out_error(module) < 0.2 * before


@pytest.mark.slow
def test_the_drift_of_a_bent_path_carries_noise_to_the_end_points(tmp_path):
    """The continuity equation: the fitted drift's ODE has the distribution of P_n at t = 1, although its paths are other ones."""
    flows = teachers()
    flows[-1] = mixture_flow(MEANS, "learner", base=None)
    module = method(tmp_path, flows, prediction=0.0, drift=1.0, kimg=150, shuffled=False)
    fit(module, None)
    ends = flows[-1].sample(latents())
    real = Mixture().sample(512, torch.Generator().manual_seed(1))
    noise_distance = energy_distance(latents(), real)
    assert energy_distance(module.sample(latents()), ends) < 0.05 * noise_distance
    assert module.frozen_networks() == [module.distance]  # the flows' samples are stored


@pytest.mark.slow
def test_shuffled_control_points_do_worse(tmp_path):
    """The drift's target is noise where inner control points belong to other samples."""
    errors = []
    for shuffled in (False, True):
        module = method(tmp_path, prediction=0.0, drift=1.0, shuffled=shuffled, kimg=40)
        _, losses = trained(module)
        errors.append(sum(losses[-50:]) / 50)
    assert errors[1] > 1.5 * errors[0]


# -- its parts -------------------------------------------------------------------------------------------------------


def batch_of(module, count=64):
    data = module.training_data(None)
    for store in data.train_stores:
        store.fill()
    indices = torch.arange(count).numpy()
    states = torch.cat([store.states(indices) for store in data.train_stores], 1)
    seeds = torch.arange(count) + data.train_stores[0].first_seed
    return {"seed": seeds, "position": torch.arange(count), "noise": sample_noise(seeds, (2, 1, 1)), "states": states}


class Clock:
    def __init__(self, step):
        self.global_step = step


@pytest.fixture
def at_step(monkeypatch):
    def points(module, batch, step=0):
        monkeypatch.setattr(type(module), "trainer", Clock(step))
        return module.control_points_of(batch)

    return points


@pytest.mark.parametrize("order", [2, 3])
def test_trajectory_slots_pass_through_the_teachers_states(tmp_path, at_step, order):
    flow = mixture_flow(steps=24)
    module = method(tmp_path, [flow], order=order, slot="trajectory")
    batch = batch_of(module)
    control = at_step(module, batch)
    fine = list(mixture_flow(steps=24).trajectory(batch["noise"], through=tuple(module.through)))
    sigmas = flow.sigmas(through=tuple(module.through)).tolist()
    for k, level in enumerate(module.through, 1):
        assert level == pytest.approx((order - k) / k)
        expected = fine[sigmas.index(level) - 1] / (1 + level)
        at = torch.full((64,), k / order, dtype=torch.float64)
        torch.testing.assert_close(bezier.point(control, at).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(control[:, -1], batch["states"][:, -1])


def test_one_hot_ends_are_fixed_for_each_sample(tmp_path, at_step):
    """Else a student would regress on several targets for one noise, hence on their mean."""
    module = method(tmp_path, order=1, weights=[[0.5, 0.5]])
    batch = batch_of(module)
    first = at_step(module, batch)[:, -1]
    again = at_step(module, {**batch, "position": batch["position"] + 999}, step=7)[:, -1]
    assert torch.equal(first, again)
    own = batch["states"].unflatten(1, (2, -1))[:, :, -1]
    taken = torch.stack([(first == own[:, j]).flatten(1).all(1) for j in range(2)])
    assert (taken.sum(0) >= 1).all()
    assert 16 < taken[0].sum() < 48


def test_weights_move_over_training(tmp_path, at_step):
    module = method(tmp_path, weights=[[1, 0], [0, 1]], final_weights=[[0, 1], [0, 1]])
    batch = batch_of(module)
    ends = batch["states"].unflatten(1, (2, -1))[:, :, -1]
    torch.testing.assert_close(at_step(module, batch, 0)[:, 1], ends[:, 0])
    torch.testing.assert_close(at_step(module, batch, module.total_steps)[:, 1], ends[:, 1])
    halfway = module.total_steps / 2
    torch.testing.assert_close(at_step(module, batch, halfway)[:, 1], ends.mean(1))


def test_teachers_see_one_noise(tmp_path):
    module = method(tmp_path)
    batch = batch_of(module)
    ends = batch["states"].unflatten(1, (2, -1))[:, :, -1]
    for j, flow in enumerate(module.teachers):
        torch.testing.assert_close(ends[:, j], flow.sample(batch["noise"]), rtol=0, atol=1e-5)


def test_edm_teachers_and_flows_guide_together(tmp_path):
    module = method(tmp_path, [exact_teacher(), mixture_flow()], kimg=4)
    fit(module, None)
    assert module.sample(latents(4)).isfinite().all()


def test_two_objectives_have_two_outputs_and_the_export_has_one(tmp_path):
    module = method(tmp_path, drift=1.0)
    plain = method(tmp_path)
    assert module.student.network.last.branches == 2
    assert method(tmp_path, drift=1.0, shared=True).student.network.last.branches == 1
    shapes = {key: value.shape for key, value in plain.student.network.state_dict().items()}
    assert {key: value.shape for key, value in module.exported().items()} == shapes


def test_steps_are_one_for_the_end_and_any_for_the_drift(tmp_path):
    with pytest.raises(ValueError, match="takes 1, and no other number"):
        method(tmp_path).choose_steps(2, tmp_path)
    flow = method(tmp_path, prediction=0.0, drift=1.0)
    flow.choose_steps(3, tmp_path)
    assert flow.nfe == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "method.order must be an integer of at least 1, got 0"),
        ({"slot": "line"}, "method.slot must be one of endpoint, trajectory, linear, got 'line'"),
        (
            {"order": 3, "slot": ["endpoint"]},
            r"method.slot=\['endpoint'\].* the 2 inner control points of method.order=3",
        ),
        ({"order": 3, "slot": ["endpoint", "line"]}, "method.slot"),
        ({"weights": [[0.7, 0.4], [0, 1]]}, r"method.weights.* control point 1 are \[0.7, 0.4\]; .* sum to 1"),
        ({"final_weights": [[0.7, 0.4], [0, 1]]}, "method.final_weights"),
        ({"end_row": "mean"}, "method.end_row"),
        ({"prediction": -1}, "method.prediction"),
        ({"prediction": 0.0}, "both zero"),
        ({"loss": "l4"}, "method.loss"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        method(tmp_path, **options)


def test_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one teacher"):
        method(tmp_path, [])


def test_too_few_steps_for_the_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher mixture has too few steps \(2\) to pass through the noise levels"):
        method(tmp_path, [mixture_flow(steps=2)], order=4, slot="trajectory").training_data(None)


def test_a_network_of_zeros_is_a_flow_too(tmp_path):
    assert mixture_flow(base=Nothing()).sample(latents(4)).shape == (4, 2, 1, 1)
