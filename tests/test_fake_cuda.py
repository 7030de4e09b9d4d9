"""CUDA without a GPU: on a fake device every method trains and samples on one device, and the host never waits for it.

See tools/fake_cuda.py for what is caught, and how the message names the line.
"""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
from extractor_files import write_clip, write_dinov2
from fake_cuda import DEVICE, FakeCuda, HostWaits, WrongDevice, place_on_fake_cuda
from inception_file import write_inception
from method_runs import METHODS, config
from metric_stubs import SHAPE, Packed, Stub, sampler
from network_tools import NETWORKS, inputs, tiny
from pytorch_lightning.callbacks import Checkpoint

from callbacks import EMA, Clock, GenerativeMetrics, NonFiniteGuard, Progress, SampleGrid
from datamodules.components.augmentation import _operators
from launch.run.build import build, build_seeded, build_stages, build_trainer, fit_stages
from launch.run.folder import RunFolder
from stillhouse.analysis.flow_errors import path_bending
from stillhouse.diffusion import preconditioning
from stillhouse.diffusion.flow import euler_path
from stillhouse.diffusion.noise_levels import KarrasGrid
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.solvers import SOLVERS
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.evaluation import METRICS, measure_real_images, measure_sampler
from stillhouse.metrics.extractors import Digits, Fashion, Inception, Pixels, Points, TorchFidelity
from stillhouse.metrics.reference import reference_statistics
from stillhouse.metrics.sampling import sample_features, sampler_inputs
from stillhouse.metrics.statistics import RunningGaussian
from stillhouse.networks import Discriminator
from stillhouse.pictures.samples import save_final_pictures, save_progress_picture

# What is called again and again in a training: nothing in it may wait but what the next table names.
HOT = (
    "pytorch_lightning.loops.training_epoch_loop.advance",
    "pytorch_lightning.loops.evaluation_loop._evaluation_step",
)
MAY_WAIT = {
    "pytorch_lightning.trainer.trainer._run": ("what begins and ends a training, and a validation as a whole", 1),
    "pytorch_lightning.trainer.trainer._teardown": ("the same after an error", 1),
    "pytorch_lightning.trainer.connectors.checkpoint_connector.dump_checkpoint": ("a checkpoint holds values", 1),
    # In steps that are logged: the first, every third here, and the last.
    "pytorch_lightning.core.module.__to_tensor": ("a number is logged", 1),
    "pytorch_lightning.trainer.connectors.logger_connector.logger_connector.log_metrics": ("values are logged", 1),
    "callbacks.progress._show": ("a line of progress shows the losses, at times", 1),
    "callbacks.score_health.on_train_batch_end": ("it looks at what has been logged", 1),
    "callbacks.non_finite._check": ("whether the losses are finite, every n steps", 0),
    "lightning_modules.components.backtracking.switch_due": ("the mismatch is compared, every ten updates", 1),
    "lightning_modules.components.backtracking.load_target": ("the next target's weights are loaded, at a switch", 1),
    "lightning_modules.components.degradation_path.save": ("a node's weights are checked and written", 1),
    "callbacks.clock.seconds": ("the clock is read, for a node or a checkpoint", 1),
    "lightning_modules.progressive.choose_steps": ("the weights of another round are read", 1),
    # In each step.
    "torch.amp.grad_scaler._maybe_opt_step": ("a loss scale asks for overflows where the optimiser is not fused", 0),
    # Once in a process.
    "datamodules.components.augmentation._operators": ("filters are made at the first use, for each size of images", 1),
}
LOGGED_EVERY, STEPS, BATCH = 3, 3, 4
GAN = {"generator": 0.1, "fake": 0.1, "sigmas": "${noise_levels.karras}"}
AUGMENTED = {"teacher.network.augment_dim": 9, "method.augment": 0.5}
CASES = {name: (name, {}) for name in METHODS} | {
    "pretrain, augmented": ("pretrain", AUGMENTED),
    "pretrain, flipped": ("pretrain", {"data.flip": True, "method.warmup_kimg": 1, "method.weight_decay": 0.1}),
    "pretrain, largest micro-batch": ("pretrain", {"trainer.micro_batch": "auto"}),
    "pretrain, radam": ("pretrain", {"method.optimizer": "radam"}),
    "pretrain, micro-batches, clipped": ("pretrain", {"trainer.micro_batch": 2, "trainer.gradient_clip_val": 1.0}),
    "denoising_student, noisy targets": ("denoising_student", {"method.target_noise": 0.1}),
    "diff_instruct, gan": ("diff_instruct", {"method.gan": GAN}),
    "diff_instruct, two-sided": ("diff_instruct", {"method.two_sided": True, "method.clip": 1.0}),
    "diff_instruct, dmd, data's labels": ("diff_instruct", {"method.weighting": "dmd", "method.labels": "data"}),
    "disback, gan": ("disback", {"method.gan": GAN}),
    "disback, switches": ("disback", {"method.two_sided": True, "method.interval": 3}),
    "disback, converged": ("disback", {"method.two_sided": True, "method.switch": "converged"}),
    "sida, micro-batches": ("sida", {"trainer.micro_batch": 2}),
    "dmd2, noised inputs": ("dmd2", {"method.inputs": "noised", "method.labels": "data", "method.steps": 3}),
    "moment_matching, grid": ("moment_matching", {"method.times": "grid", "method.steps": 3}),
    "sid, checkpointing": ("sid", {"method.checkpointing": True}),
    "scm, finite differences": ("scm", {"method.derivative": "finite", "method.target": "data"}),
    "consistency_distillation, no average": ("consistency_distillation", {"method.target_halflife": 0}),
    "sfd, several steps": ("sfd", {"method.steps": [1, 2], "method.teacher_afs": True}),
    "rectified_flow, augmented": ("rectified_flow", AUGMENTED),
    "flow_distill, two steps": ("flow_distill", {"method.steps": 2}),
    "bezier, both fits": (
        "bezier",
        {"method.drift": 0.5, "method.slot": "trajectory", "method.shuffled": True}
        | {f"method.teachers.{i}.steps": 4 for i in range(2)},
    ),
}
QUICK = ("pretrain, micro-batches, clipped",)


class Count(pl.Callback):
    def __init__(self, cuda):
        self.cuda = cuda

    def on_train_batch_start(self, trainer, *_):
        self.cuda.step = trainer.global_step + 1


def train(cuda, name, changes, precision, data, *callbacks):
    """Train it, on the device, as train.py does; gives the method and, for each training of it, its last step."""
    changes = {"batch_size": BATCH, "method.kimg": STEPS * BATCH / 1000, "trainer.precision": precision} | changes
    changes |= {"trainer.log_every_n_steps": LOGGED_EVERY, "trainer.validate_every_n_steps": LOGGED_EVERY}
    cfg = config(name, changes, data)
    images, method = build(cfg.data), build_seeded(cfg.method, cfg.seed)
    training, folder = method.training_data(images), RunFolder(cfg.folder)
    with patch("launch.run.trainer_options.device_kind", return_value=("cuda", (9, 0))):
        stages = build_stages(cfg, method, images, folder)
        trainer = build_trainer(cfg, method, folder)
    for one in (trainer, *(stage.trainer for stage in stages)):
        place_on_fake_cuda(one)
        usual = Clock(), EMA(), NonFiniteGuard(LOGGED_EVERY), Progress(every_kimg=1)
        every = [*one.callbacks, *usual, *callbacks, Count(cuda)]
        one.callbacks = sorted(
            every, key=lambda callback: isinstance(callback, Checkpoint)
        )  # last, as Lightning has it
    fit_stages(stages, method, folder)
    trainer.fit(method, training)
    for nfe in (None, 1, 2, 3, 4):
        try:
            method.choose_steps(nfe, folder.path)
        except ValueError:  # it is not for so many
            continue
        inputs = sampler_inputs(torch.arange(BATCH, device=DEVICE), method.image_shape, images.num_classes, BATCH)
        assert all(method.sample(*each).device == DEVICE for each in inputs)
    method.training_curves(torch.arange(BATCH, device=DEVICE))
    return method, {one.trainer.max_steps for one in (method, *(stage.method for stage in stages))}


@pytest.fixture(autouse=True)
def _no_fake_tensor_is_kept():
    yield
    _operators.cache_clear()


def trainings():
    """The quick ones on points of the plane, whose network is the smallest; the others take minutes together."""
    points, digits = "checkerboard", "digits"
    for data, precision in ((points, "bf16-mixed"), (points, "16-mixed"), (digits, "bf16-mixed"), (digits, "32-true")):
        for case, (name, changes) in CASES.items():
            lacks_labels = data == points and "method.augment" in changes
            no_loss_scale = "method.gan" in changes or name in ("sid", "sida", "dmd2")
            if lacks_labels or (no_loss_scale and precision == "16-mixed"):
                continue
            quick = case in QUICK and (data, precision) == (points, "bf16-mixed")
            id = f"{case}-{data}-{precision}"
            yield pytest.param(name, changes, data, precision, marks=() if quick else pytest.mark.slow, id=id)


@pytest.mark.parametrize(("name", "changes", "data", "precision"), trainings())
def test_training_and_sampling_stay_on_the_device_and_never_wait(name, changes, data, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_modules.components.backtracking._COMPARE_EVERY", LOGGED_EVERY)
    with FakeCuda(MAY_WAIT, HOT).entered() as cuda:
        method, last = train(cuda, name, changes, precision, data)
    due = {0, 1, *range(0, STEPS + 1, LOGGED_EVERY), *last}
    in_between = {function: steps - due for function, steps in cuda.waits.items() if steps - due}
    assert set(in_between) <= {"torch.amp.grad_scaler._maybe_opt_step"}, in_between
    assert all(p.device == DEVICE for network in method.trained_networks().values() for p in network.parameters())


SETUP = {"torch.nn.modules.module.to": ("a network is moved to the device", 1)}


@pytest.mark.parametrize("kind", ["mlp", *(pytest.param(k, marks=pytest.mark.slow) for k in NETWORKS if k != "mlp")])
def test_networks_and_the_discriminator(kind):
    """Both passes, in float32 and under autocast."""
    network = tiny(kind, dropout=0.1).train()
    head = Discriminator(network)
    with FakeCuda(SETUP).entered():
        network.to(DEVICE), head.to(DEVICE)
        arguments = [each.to(DEVICE, non_blocking=True) for each in inputs(network)]
        for low in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=low):
                output, features = network(*arguments), network.encode(*arguments)
                (output.float().square().mean() + head(features).mean()).backward()
        assert all(p.grad.device == DEVICE for module in (network, head) for p in module.parameters())


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.two_times])
def test_solvers(solver):
    options = {"stochastic_heun": {"s_churn": 10}, "dpm_solver_pp": {"threshold": 0.995}}.get(solver)
    teacher = Teacher("t", tiny("mlp"), preconditioning.EDM(), karras, solver=solver, solver_options=options)
    with FakeCuda(SETUP).entered():
        teacher.to(DEVICE)
        noise, labels = torch.randn(3, 2, 1, 1, device=DEVICE), torch.arange(3, device=DEVICE)
        states = [*teacher.trajectory(noise, labels, 3, through=[1.0]), teacher.sampling(2)(teacher.denoiser, noise)]
        states += [z for z, _ in euler_path(teacher, noise, None, 1)]
    assert all(state.device == DEVICE for state in states)


def test_preconditionings_and_noise_levels():
    consistency = {"Consistency": lambda: preconditioning.Consistency(preconditioning.EDM())}
    with FakeCuda(SETUP).entered():
        sigma = KarrasGrid()(torch.rand(5, device=DEVICE, dtype=torch.float64))
        for each in (kind().to(DEVICE) for kind in (preconditioning.PRECONDITIONINGS | consistency).values()):
            assert all(c.device == DEVICE for c in (*each(sigma), each.prior_std(sigma), each.loss_weight(sigma)))


def small_extractors(folder):
    return [(Digits(), (1, 8, 8)), (Fashion(16), (1, 16, 16)), (Pixels(), (3, 8, 8)), (Points(), (2, 1, 1))]


def large_extractors(folder):
    clip, dinov2 = write_clip(folder / "clip.pt"), write_dinov2(folder / "dinov2.pth")
    made = [TorchFidelity("clip-vit-b-32", clip), TorchFidelity("dinov2-vit-s-14", dinov2)]
    return [(each, (3, 32, 32)) for each in (Inception(write_inception(folder / "inception.pth")), *made)]


@pytest.mark.parametrize("extractors", [small_extractors, pytest.param(large_extractors, marks=pytest.mark.slow)])
def test_features_of_samples_and_their_statistics(extractors, tmp_path):
    may_wait = SETUP | {
        "stillhouse.metrics.sampling.sample_features": ("the seeds, and at the end the samples that are not finite", 0),
        "stillhouse.metrics.sampling.seconds": ("the time of all samples", 1),
        "torchvision.transforms._functional_tensor.normalize": (
            "torch-fidelity's CLIP, DINOv2 and VGG, per 128 images",
            0,
        ),
    }
    made = extractors(tmp_path)
    for extractor, shape in made:
        within = f"{type(extractor).__module__}.__call__", "stillhouse.metrics.sampling.sampler_inputs"
        with FakeCuda(may_wait, within).entered():
            options = {"shape": shape, "num_classes": 3, "class_counts": (1, 5, 2), "batch_size": 2, "device": DEVICE}
            rows, _ = sample_features(lambda noise, labels: noise, extractor, torch.arange(5), **options)
            assert RunningGaussian(extractor.dim, DEVICE).update(rows).cov.device == DEVICE


@pytest.mark.slow
def test_measurements_and_pictures_stay_on_the_device(tmp_path):
    """They wait for what they measure and show, and mix no devices."""
    answers = {"stillhouse.metrics.sampling.sample_features": ("the samples that are not finite", 0)}
    answers[f"{__name__}.{test_measurements_and_pictures_stay_on_the_device.__name__}"] = ("all else", 1)
    packed, numbers = Packed(100), torch.arange(4)
    data = SimpleNamespace(channels=1, resolution=4, num_classes=3, reference=lambda: packed)
    options = {"num_samples": 40, "blocks": 2, "num_classes": 3, "batch_size": 20, "device": DEVICE, "progress": False}
    with FakeCuda(answers).entered():
        held_out = {"held_out": Packed(50)}
        reference = reference_statistics(packed, Stub(), tmp_path, keep_features=True, device=DEVICE, **held_out)
        options |= {"reference": reference, "extractor": Stub(), "metrics": METRICS, "name": "t"}
        records = measure_sampler(sampler, subject="student", nfe=1, shape=SHAPE, **options)
        assert len(records) == len(measure_real_images(packed, **held_out, **options)) == len(METRICS)
        save_progress_picture(tmp_path / "grid.png", sampler, data, DEVICE, 2, 3)
        save_final_pictures(tmp_path, {"one": sampler, "two": sampler}, data, DEVICE)
        teacher = Teacher("t", tiny("mlp"), preconditioning.EDM(), karras, steps=3).to(DEVICE)
        noise = sample_noise(numbers.to(DEVICE), (2, 1, 1))
        path_bending(teacher, noise, None, 2)


@pytest.mark.slow
def test_measurements_and_pictures_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = {
        "stillhouse.metrics.sampling.sample_features": ("the samples that are not finite", 0),
        "callbacks.generative_metrics.on_train_batch_end": ("a measurement", 1),
        "callbacks.sample_grid.on_train_batch_end": ("a picture", 1),
    }
    metrics = GenerativeMetrics(every_kimg=1, num_samples=20, extractor=Digits())
    with FakeCuda(MAY_WAIT | measured, HOT).entered() as cuda:
        train(cuda, "pretrain", {}, "bf16-mixed", "digits", metrics, SampleGrid(every_kimg=1))
    assert {STEPS} == cuda.waits["callbacks.generative_metrics.on_train_batch_end"]
    assert list(tmp_path.rglob("samples/*.png"))


CPU = torch.ones(3)
WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "cpu": lambda x: x.cpu(),
    "copy to the CPU": lambda x: CPU.copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x),
    "unique": lambda x: x.unique(),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "to": lambda x: x + CPU.to(x.device),
    "copy": lambda x: x.copy_(CPU),
    "tensor": lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device) * x,
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "as_tensor": lambda x: torch.as_tensor(1.0, device=x.device),
    "index of a list": lambda x: x[[0, 2]],
    "index on the CPU": lambda x: x[torch.tensor([0, 2])],
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("act", WAITS.values(), ids=WAITS)
def test_every_wait_is_caught_and_its_line_is_named(act):
    with FakeCuda().entered():
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises(
            HostWaits, match=r"^tests/test_fake_cuda.py:\d+ `.*lambda x:.*the host waits for the device"
        ):
            act(x)


def test_a_tensor_on_another_device_is_caught_and_what_is_fine_is_not():
    with FakeCuda().entered():
        x = torch.zeros(3, device=DEVICE, requires_grad=True)
        for wrong in (lambda: x + CPU, lambda: torch.cat([x, CPU]), lambda: torch.nn.functional.linear(x, CPU[None])):
            with pytest.raises(WrongDevice, match="lambda"):
                wrong()
        y = x * torch.tensor(2.0) + CPU.to(DEVICE, non_blocking=True)  # a scalar on the CPU is a number
        y = torch.where(y > 0, y, x.new_full((), 1.0)).masked_fill(y < 0, 0)
        y.sum().backward()
        assert x.grad.device == DEVICE
        assert CPU.sum().item() == 3
