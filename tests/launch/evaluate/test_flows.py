"""Chains of flows of planar data, which are known exactly, and students that are."""

import copy
import json

import pytest
import torch
from flow_chain_tools import Constant, PlanarData, PlanarExtractor, flow, gaussian_flow, mixture_flow
from matplotlib.image import imread
from omegaconf import OmegaConf

from launch.evaluate.flows import FlowMeasurement, draw_flow_paths, place, planar
from launch.evaluate.measure import Evaluation
from launch.evaluate.trained_run import TrainedRun, Weights
from launch.run.folder import RunFolder
from lightning_modules import BezierDistillation, FlowDistillation
from stillhouse.analysis.flow_chain import flow_chain_from_json, flow_chain_to_json, load_flow_chain
from stillhouse.analysis.flow_plot import write_flow_chain
from stillhouse.diffusion import bezier
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.time_distributions import Start, Uniform

COMMON = {"batch_size": 16, "seed": 0, "kimg": 0.1, "lr": 1e-3, "pairs": 32, "held_out": 16}
SETTINGS = {"metrics": ["fid"], "num_samples": 60, "blocks": 2, "batch_size": 32}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    settings = SETTINGS | {"extractor": PlanarExtractor()}
    return Evaluation(settings, PlanarData(), torch.device("cpu"), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def flows():
    return [
        mixture_flow(name="rf1", steps=12),
        gaussian_flow(name="rf2", steps=12),
        flow(Constant(), name="rf3", steps=3),
    ]


def distilled(teacher, seed=0, **options):
    return FlowDistillation(teacher, **COMMON | {"name": "flow_distill", "seed": seed}, **options)


def curved(teachers, **options):
    common = COMMON | {"name": "bezier", "order": 2, "slot": "endpoint", "weights": None, "final_weights": None}
    common |= {"end_row": "one_hot", "shuffled": False, "prediction": 1.0, "prediction_times": Start(), "drift": 0.0}
    return BezierDistillation(teachers, **common | {"drift_times": Uniform(), "shared": False} | options)


def run(method, name, training=None, **options):
    config = {"name": name, "seed": method.seed, "method": {"name": method.name, "seed": method.seed, **options}}
    return TrainedRun(RunFolder(f"runs/{name}"), OmegaConf.create(config), method, Weights("ema", training))


@pytest.fixture(scope="module")
def chain(flows, evaluation):
    students = [
        run(distilled(flows[2], seed=0), "a0", teacher={"name": "rf3"}),
        run(distilled(flows[2], seed=1), "a1", teacher={"name": "rf3"}),
        run(distilled(flows[1]), "b0", teacher={"name": "rf2"}),
        run(curved(flows[1:]), "c0", teachers=[{"name": "rf2"}, {"name": "rf3"}]),
        run(curved(flows[:2]), "d0", teachers=[{"name": "rf1"}, {"name": "rf2"}]),
        run(curved([flows[0], flows[2]], order=1), "e0", teachers=[{"name": "rf1"}, {"name": "rf3"}]),
    ]
    return FlowMeasurement(flows, evaluation, samples=64, path_steps=20).run([1, 2], students)


def test_every_flow_is_measured_against_the_one_before_and_the_first(chain, flows):
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    ends = [flow.sample(noise).double() for flow in flows]
    expected = [(None if k == 0 else (ends[k] - ends[k - 1]).square().sum((1, 2, 3)).mean().item()) for k in range(3)]
    assert [flow.step_drift and flow.step_drift.mean for flow in chain.flows] == [
        None,
        *map(pytest.approx, expected[1:]),
    ]
    assert chain.flows[1].end_drift == chain.flows[1].step_drift
    assert chain.flows[2].end_drift.mean == pytest.approx((ends[2] - ends[0]).square().sum((1, 2, 3)).mean().item())
    assert chain.drifted(3) == pytest.approx(sum(value**0.5 for value in expected[1:]))
    assert [flow.nfe for flow in chain.flows] == [23, 23, 5]
    assert chain.flows[0].straightness.mean > 0.1
    assert chain.flows[2].straightness.mean < 1e-12
    assert all(flow.w2 <= chain.bound(k) for k, flow in enumerate(chain.flows, 1))
    assert list(chain.floor) == chain.metrics == ["fid_planar"]
    assert chain.matched == 64


def test_one_euler_step_is_enough_for_a_straight_flow_alone(chain, flows):
    first, _, straight = chain.flows
    value = straight.simulated["fid_planar"][0]
    assert straight.euler[1]["fid_planar"][0] == pytest.approx(value, rel=1e-4)
    assert first.euler[1]["fid_planar"][0] > 2 * first.euler[2]["fid_planar"][0] > 4 * first.simulated["fid_planar"][0]
    assert flows[0].solver == "flow_heun"  # measured by a copy


def test_students_stand_beside_their_last_teacher(chain, flows):
    """They start as it, so that one Euler step is what they do."""
    found = {value.name: value for value in chain.distilled}
    assert {name: value.flow for name, value in found.items()} == {"a0": 3, "a1": 3, "b0": 2, "c0": 3, "d0": 2, "e0": 3}
    assert found["a0"].regression.mean < 1e-8  # one step of a straight flow
    noise = sample_noise(torch.arange(64), (2, 1, 1))
    step = distilled(flows[1]).sample(noise)
    expected = (step - flows[1].sample(noise)).double().square().sum((1, 2, 3)).mean().item()
    assert found["b0"].regression.mean == found["d0"].regression.mean == pytest.approx(expected)
    assert found["b0"].scores["fid_planar"][0] == pytest.approx(chain.flows[1].euler[1]["fid_planar"][0], rel=1e-3)
    assert found["b0"].w2 <= chain.bound(2, found["b0"].regression)
    assert found["e0"].regression is None  # whose ends are those of two teachers


def test_runs_alike_but_for_their_seed_and_place_are_one_group(chain):
    groups = {
        group: {k: [r.name for r in runs] for k, runs in places.items()} for group, places in chain.groups().items()
    }
    assert groups == {
        "flow_distill": {2: ["b0"], 3: ["a0", "a1"]},
        "bezier teachers=k-1,k": {2: ["d0"], 3: ["c0"]},
        "bezier teachers=k-2,k": {3: ["e0"]},
    }


def test_the_end_teacher_of_curves(flows):
    assert distilled(flows[0]).end_teacher() is flows[0]
    assert curved(flows[:2]).end_teacher() is flows[1]
    assert curved(flows[:2], weights=[[0, 1], [1, 0]]).end_teacher() is flows[0]
    assert curved(flows[:2], weights=[[0, 1], [0.5, 0.5]]).end_teacher() is None
    assert curved(flows[:2], weights=[[1, 0], [1, 0]], final_weights=[[1, 0], [0, 1]]).end_teacher() is flows[1]


def test_samples_by_another_solver_are_noted(flows, evaluation):
    other = copy.copy(flows[0])
    other.steps = 2
    chain = FlowMeasurement(flows[:1], evaluation, samples=8, path_steps=2).run([1], [run(distilled(other), "a")])
    assert chain.notes == ("runs/a was trained on samples of flow_heun at 3 NFE, not flow_heun at 23 NFE",)


def test_a_student_measured_while_it_was_trained_is_noted(flows, evaluation):
    half = run(distilled(flows[0]), "a", training={"step": 4, "reached": 6, "total": 13})
    chain = FlowMeasurement(flows[:1], evaluation, samples=8, path_steps=2).run([1], [half])
    assert chain.notes == ("runs/a was measured after 4 of 13 training steps",)


def test_a_chain_survives_its_file(chain, tmp_path):
    assert flow_chain_from_json(json.loads(json.dumps(flow_chain_to_json(chain)))) == chain
    printed = write_flow_chain(chain, tmp_path / "flows")
    assert printed.endswith(f"{tmp_path}/flows/flows.json and flows.png written")
    assert sorted(path.name for path in (tmp_path / "flows").iterdir()) == ["flows.json", "flows.png"]
    assert load_flow_chain(tmp_path / "flows/flows.json") == chain
    with pytest.raises(FileNotFoundError, match=f"no measured flows at {tmp_path}/none.json"):
        load_flow_chain(tmp_path / "none.json")
    for broken in ("[{]", "[]", '{"flows": [{"name": "a"}]}'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"broken.json is damaged"):
            load_flow_chain(tmp_path / "broken.json")


def test_misuse(flows, evaluation):
    other = flow(Constant((1.0, 1.0)), name="other")
    with pytest.raises(ValueError, match=r"the teacher of runs/a is other \(.*\), not one of the flows rf1 \("):
        place(flows, run(distilled(other), "a"))
    large = flow(Constant(), name="large")
    large.denoiser.network.resolution = 2
    with pytest.raises(
        ValueError, match="teacher large has resolution=2, the data planar 1: choose a teacher that fits"
    ):
        FlowMeasurement([large], evaluation, samples=8, path_steps=2)


def test_control_points_are_those_of_training(flows):
    """Through trajectory points at t = 1/2 the curve passes at 1/2."""
    seeds = torch.arange(5)
    noise = sample_noise(seeds, (2, 1, 1)).double()
    control = curved(flows[:2]).training_curves(seeds)[1]
    expected = torch.stack([noise, *(f.sample(noise).double() for f in flows[:2])], 1)
    torch.testing.assert_close(control, expected, rtol=1e-5, atol=1e-5)
    method = curved(flows[:1], slot="trajectory")
    levels = list(method.through)
    sigmas = flows[0].sigmas(None, levels).tolist()
    states = list(flows[0].trajectory(noise, through=levels))
    middle = bezier.point(method.training_curves(seeds)[1], torch.full((5,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(middle, 0.5 * states[sigmas.index(levels[0]) - 1])


def test_paths_are_drawn_for_planar_data(flows, evaluation, tmp_path, monkeypatch):
    assert planar((2, 1, 1))
    assert not planar((1, 8, 8))
    seen = []
    monkeypatch.setattr("launch.evaluate.flows.plot_paths", lambda path, panels: seen.extend(panels))
    students = [curved(flows[:2]), curved(flows[:2]), distilled(flows[0]), curved(flows[:1], order=1)]
    draw_flow_paths(tmp_path / "paths.png", flows, students, evaluation, steps=6)
    assert [panel.title for panel in seen] == [
        "noise and data, paired at random",
        "flow 1: rf1",
        "flow 2: rf2",
        "flow 3: rf3",
        "Bezier, order 2, endpoint: training curves\n(rf1, rf2)",
        "Bezier, order 1: training curves\n(rf1)",
    ]
    assert [len(panel.curves[0]) for panel in seen] == [2, 7, 7, 7, 65, 65]
    torch.testing.assert_close(seen[1].starts, seen[4].starts)
    assert seen[4].marks.shape == (48, 2)
    assert seen[5].marks is None
    monkeypatch.undo()
    draw_flow_paths(tmp_path / "paths.png", flows, students, evaluation, steps=40)
    assert imread(tmp_path / "paths.png")[..., :3].std() > 0.05
