"""DisBack: the recorded path, the order of its targets, its equality with Diff-Instruct, and misuse."""

import itertools
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_diff_instruct import OPTIONS, snapshots

from callbacks import Clock
from closed_forms import CorrectedByLevel, Mixture, energy_distance, exact_teacher, fit
from lightning_modules import DMD2, DiffInstruct, DisBack, SiD
from lightning_modules.components.degradation_path import node_steps
from lightning_modules.components.degradation_recording import DegradationRecording
from stillhouse.diffusion.losses import denoising_score_matching
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.sampling import one_step

DEGRADATION = {"steps": 64, "lr": 3e-3, "batch_size": 128, "seed": 0, "spacing": "geometric"}


def method(store, cls=DisBack, teacher=None, kimg=1.024, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=CorrectedByLevel)
    common = {"name": "disback", "batch_size": 128, "seed": 0, "kimg": kimg, "lr": 1e-3} | options
    own = {"nodes": 3, "interval": 2, "degradation": DEGRADATION, "store": str(store)}
    return cls(teacher, **(OPTIONS | own | common))


def record(module):
    """Stage 1, as train.py does it."""
    for stage in module.stages().values():
        trainer = fit(stage, None, Clock())
    return trainer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A store with the path of three nodes."""
    store = tmp_path_factory.mktemp("store")
    record(method(store))
    return store


def copied(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "store")


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# -- stage 1 ----------------------------------------------------------------------------------------------------------


def test_node_steps():
    assert node_steps(5, 300, "geometric") == [3, 10, 31, 96, 300]
    assert node_steps(4, 100, "linear") == [25, 50, 75, 100]
    assert node_steps(1, 1, "geometric") == [1]


def test_the_path_leads_from_the_data_to_the_untrained_generator(recorded):
    """Node by node the denoising loss falls on the generator's images and rises on the mixture's."""
    module = method(recorded)
    count = 4000
    images = one_step(module.teacher.denoiser, sample_noise(torch.arange(count), (2, 1, 1)), 2.5, None)
    data = Mixture().sample(count, torch.Generator().manual_seed(1)).float()
    sigma, noise = (
        OPTIONS["fake_sigmas"](torch.rand(count).double()),
        sample_noise(torch.arange(count) + count, (2, 1, 1)),
    )
    denoiser, losses = module.teacher.student(), []
    for step in (0, *module.path.steps):
        if step:
            module.path.load(step, denoiser.network)
        with torch.no_grad():
            losses.append([denoising_score_matching(denoiser, x, sigma, noise).mean().item() for x in (images, data)])
    assert module.path.steps == [4, 16, 64]
    on_generated, on_data = zip(*losses, strict=True)
    assert sorted(on_generated, reverse=True) == list(on_generated)
    assert sorted(on_data) == list(on_data)
    assert on_generated[-1] < 0.7 * on_generated[0]


def test_the_teacher_is_off_the_device_after_it(tmp_path, monkeypatch):
    module, places = method(tmp_path), []
    monkeypatch.setattr(type(module.teacher), "to", lambda self, device: places.append(str(device)) or self)
    monkeypatch.setattr(DegradationRecording, "device", "the accelerator", raising=False)
    (stage,) = module.stages().values()
    stage.on_fit_start()
    assert places == ["the accelerator"]
    stage.trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda: None))
    stage.on_train_end()
    assert places == ["the accelerator", "cpu"]


def test_its_cards_say_what_it_cost(recorded):
    cost = method(recorded).preparation(None)
    assert cost["steps"] == 64
    assert cost["images"] == 64 * 128
    assert 0 < cost["seconds"] < 100


def test_a_path_is_recorded_once_and_extended_with_the_same_bits(recorded, tmp_path):
    store = copied(recorded, tmp_path)
    before = {path.name: path.read_bytes() for path in store.rglob("node*")}
    assert len(before) == 6
    assert record(method(store)).global_step == 0
    assert record(method(store, nodes=2)).global_step == 64  # node 8 is new, 64 is not
    after = {path.name: path.read_bytes() for path in store.rglob("node*")}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"node-000008.json", "node-000008.safetensors"}
    (store / method(store).path.folder.name / "node-000016.safetensors").unlink()
    record(method(store))
    again = method(store).path.file(16)
    assert again.read_bytes() == before[again.name]


def test_seeds_and_step_sizes_of_stage_2_share_a_path_and_other_generators_do_not(tmp_path):
    folder = method(tmp_path).path.folder
    assert method(tmp_path, lr=5e-4).path.folder == folder
    assert method(tmp_path, nodes=2, interval=9).path.folder == folder
    for other in ({"sigma_init": 80.0}, {"degradation": DEGRADATION | {"lr": 1e-3}}, {"betas": (0.9, 0.99)}):
        assert method(tmp_path, **other).path.folder != folder
    assert method(tmp_path, teacher=exact_teacher(Mixture(std=0.3), network=CorrectedByLevel)).path.folder != folder


# -- stage 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DisBack, SiD, DMD2])
def test_targets_come_in_reverse_order_and_end_with_the_teacher(recorded, cls):
    """T_1 from the start, the next after every 2 generator updates; the fake score starts as T_0 = s'_N. All share a path."""
    module = method(recorded, cls, kimg=1.536, fake_updates=1)  # 12 steps, 6 generator updates
    kept = snapshots(module)
    targets, original = [], module.load_target

    def aim():
        original()
        targets.append((module.node, module.student_updates, weights(module.target.denoiser)))

    module.load_target = aim
    first = []
    module.on_train_start = lambda: first.append(weights(module.fake_score))
    fit(module, None)
    path = module.path
    states = {}
    for step in path.steps:
        network = module.teacher.student().network
        path.load(step, network)
        states[step] = weights(network)
    states["teacher"] = weights(module.teacher.denoiser)
    assert len({tuple(state.tolist()) for state in states.values()}) == 4
    assert torch.equal(first[0], states[64])
    assert [(node, updates) for node, updates, _ in targets] == [(1, 0), (2, 2), (3, 4)]
    for (_, _, found), expected in zip(targets, (16, 4, "teacher"), strict=True):
        assert torch.equal(found, states[expected])
    assert len(kept) == 12


def test_switching_leaves_fake_score_optimisers_and_learning_rate_alone(recorded):
    module = method(recorded, interval=1, kimg=0.768)
    kept = snapshots(module)
    fit(module, None)
    fakes = [copies["fake_score"] for copies, *_ in kept]
    moved = [max((a - b).abs().max() for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(fakes)]
    assert max(moved) < 3e-3  # steps of Adam at 1e-3, never the distance between nodes
    for optimizer in module.trainer.optimizers:
        assert all(int(state["step"]) == 3 for state in optimizer.state.values())


def test_no_nodes_is_diff_instruct_bit_for_bit(tmp_path):
    ours, plain = method(tmp_path, nodes=0, kimg=2.048), method(tmp_path, nodes=0, kimg=2.048)
    common = {"name": "diff_instruct", "batch_size": 128, "seed": 0, "kimg": 2.048, "lr": 1e-3}
    plain = DiffInstruct(plain.teacher, **common, **OPTIONS)
    assert ours.stages() == {}
    assert ours.preparation(None) is None
    for module in (ours, plain):
        fit(module, None)
    assert torch.equal(weights(ours.student), weights(plain.student))
    assert torch.equal(weights(ours.fake_score), weights(plain.fake_score))
    assert not torch.equal(weights(ours.student), weights(ours.teacher.denoiser))
    for a, b in zip(ours.trainer.optimizers, plain.trainer.optimizers, strict=True):
        for x, y in zip(a.state.values(), b.state.values(), strict=True):
            assert torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_switching_by_convergence(recorded, monkeypatch, bad):
    """The next target when the mean mismatch, which falls to 0.4 from update 15 on, is found halved; at the latest after 40.

    Those of steps that a loss scale skipped (the first one, and one on the way) do not enter.
    """
    module = method(recorded, switch="converged", tolerance=0.5, interval=40)
    updates = 0
    monkeypatch.setattr(type(module), "student_updates", property(lambda self: updates))
    switched = []
    for updates in range(1, 100):
        falling = bad if updates in (1, 21) else 1.0 if updates < 15 or updates > 50 else 0.4
        if module.node < module.nodes and module.switch_due(torch.tensor(falling)):
            module.node, module.last_switch, module.mismatch, module.first_mismatch = (
                module.node + 1,
                updates,
                None,
                None,
            )
            switched.append(updates)
    assert switched == [30, 70]  # 1 - 0.6 (1 - 0.8^6) = 0.56 at 20; afterwards the mismatch rises again


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture(recorded, precision):
    """Backtracked, under a tenth of the untrained generator's energy distance is left."""
    module = method(recorded, kimg=76.8, interval=30)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, None, precision=precision)
    assert module.node == 3
    assert energy_distance(module.sample(noise), real) < 0.1 * before


# -- misuse -----------------------------------------------------------------------------------------------------------


def test_the_path_needs_a_clock(tmp_path):
    stage = method(tmp_path).stages()["degradation"]
    with pytest.raises(ValueError, match="counts its seconds: put callbacks.clock back"):
        fit(stage, None)
    assert stage.trainer.global_step == 0


def test_a_missing_node(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no node .*node-000004.safetensors: run again"):
        fit(method(tmp_path), None)


def test_a_node_of_another_path(recorded, tmp_path):
    """Of the same architecture, put under the right name."""
    store = copied(recorded, tmp_path)
    path = method(store).path
    card = json.loads(path.file(16).with_suffix(".json").read_text())
    path.file(16).with_suffix(".json").write_text(json.dumps(card | {"teacher": "0" * 64}))
    with pytest.raises(ValueError, match=r"node-000016.safetensors belongs to another degradation path \(teacher '000"):
        fit(method(store), None)


@pytest.mark.parametrize("damage", ["cut", "bit", "card"])
def test_a_damaged_node(recorded, tmp_path, damage):
    store = copied(recorded, tmp_path)
    file = method(store).path.file(64)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.with_suffix(".json").write_text("{")
    with pytest.raises(OSError, match=r"node-000064.*(is damaged|delete)"):
        fit(method(store), None)


def test_a_diverged_path_is_not_kept(tmp_path):
    module = method(tmp_path)
    with torch.no_grad():
        network = module.teacher.student().network
        network.last.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged before its step 4: lower method.degradation.lr"):
        module.path.save(4, network, 512, 1.0)
    assert not list(tmp_path.rglob("node*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": -1}, "method.nodes must be an integer of at least 0, got -1"),
        (
            {"nodes": 50},
            r"method.nodes=50 do not fit into method.degradation.steps=64 \(geometric: .*: take fewer nodes or",
        ),
        (
            {"nodes": 10**12},
            "method.nodes=1000000000000 do not fit into method.degradation.steps=64: take fewer nodes or more",
        ),
        ({"interval": 0}, "method.interval must be an integer of at least 1, got 0"),
        ({"switch": "never"}, "method.switch must be one of interval, converged, got 'never'"),
        ({"degradation": None}, "method.nodes=3 needs method.degradation"),
        ({"tolerance": 1.0}, r"method.tolerance must lie in \(0, 1\), got 1.0"),
        ({"degradation": DEGRADATION | {"spacing": "odd"}}, "spacing must be one of geometric, linear, got 'odd'"),
        ({"sigma_init": 81}, "method.sigma_init=81 lies outside"),
    ],
)
def test_misuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        method(tmp_path, **options)


def test_of_a_guided_teacher_the_last_target_alone_is_guided(recorded, tmp_path):
    """Also the generator begins as the teacher's network, which nothing guides."""
    guided = exact_teacher(network=CorrectedByLevel, guidance=2.0, guide=exact_teacher(Mixture(std=0.5)))
    module = method(tmp_path, teacher=guided)
    module.path.load = lambda step, network, **_: None
    x, sigma = torch.randn(4, 2, 1, 1), torch.tensor(0.5)
    for node in (1, 2, 3):
        module.node = node
        module.load_target()
        expected = guided.denoiser if node == 3 else guided.unguided
        assert torch.equal(module.target.denoiser(x, sigma), expected(x, sigma))
    assert torch.equal(module.student(x, sigma), guided.unguided(x, sigma))
    assert module.path.folder != method(tmp_path).path.folder
    generator_updates = module.total_steps / len(module.update_cycle)
    assert module.target_evaluations == 2 - 2 * 2 / generator_updates


def test_a_run_that_ends_before_its_target_is_the_teacher_says_so(recorded, tmp_path):
    def begin(**options):
        module = method(tmp_path, **options)
        module.data, module.path.load = None, lambda step, network, **_: None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            module.setup("fit")
        return [str(warning.message) for warning in said if "degraded scores" in str(warning.message)]

    updates = method(tmp_path).student_updates_in(method(tmp_path).total_steps)
    assert begin(interval=(updates - 1) // 2) == []
    (text,) = begin(interval=updates)
    assert text.startswith(f"the teacher itself becomes the target after {2 * updates} updates of the student")
