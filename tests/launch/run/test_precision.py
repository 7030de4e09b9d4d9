"""What is float32 whatever the precision, what a device lacks, and a loss scale under two optimisers."""

import pytest
import pytorch_lightning as pl
import torch
from method_runs import METHODS, config, train, twins_slow
from pytorch_lightning.plugins.precision import Precision

from callbacks.network_layout import all_denoisers
from launch.run.build import build_seeded, build_trainer
from launch.run.folder import RunFolder
from launch.run.precision import PRECISIONS, TrainingAutocast, TrainingKernels, check_precision, precision_plugin
from lightning_modules.components.optimisation import Optimisation
from stillhouse.diffusion import losses
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.teacher import Teacher

WIDE = (torch.float32, torch.float64)


class Inside(pl.Callback):
    """What a method's networks, denoisers and losses give, in training steps and elsewhere."""

    def on_fit_start(self, trainer, pl_module):
        self.networks, self.estimates, self.elsewhere = set(), set(), set()
        for denoiser in all_denoisers(pl_module):
            denoiser.register_forward_hook(lambda module, args, out: self.estimates.add(out.dtype))
            for layer in denoiser.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.register_forward_hook(self.convolved)

    def convolved(self, module, args, out):
        (self.networks if self.training else self.elsewhere).add(out.dtype)

    training = False

    def on_train_batch_start(self, *_):
        self.training = True

    def on_train_batch_end(self, *_):
        self.training = False


@pytest.mark.parametrize("name", twins_slow(METHODS))
def test_in_mixed_precision_only_the_networks_are_low(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, kinds, inside = [], set(), Inside()
    original = Optimisation._backward

    def backward(self, loss):
        found.append(loss.dtype)
        return original(self, loss)

    monkeypatch.setattr(Optimisation, "_backward", backward)
    square = losses.weighted_square
    monkeypatch.setattr(losses, "weighted_square", lambda d, e, s: kinds.update((e.dtype, s.dtype)) or square(d, e, s))
    changes = {"trainer.precision": "bf16-mixed", "trainer.micro_batch": 3, "trainer.validate_every_n_steps": 1}
    changes["callbacks.ema"] = {"_target_": "callbacks.EMA", "averages": [{"decay": 0.9}]}
    run = train(name, changes, inside)
    run.method.sample(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    derived = {torch.float32} if name in ("scm", "mean_flow") else set()  # derivatives along a path
    assert inside.networks == {torch.bfloat16} | derived
    assert inside.elsewhere == {torch.float32}  # held-out losses and samples
    assert inside.estimates | kinds <= set(WIDE)
    assert found
    assert set(found) == {torch.float32}
    assert {value.dtype for value in run.method.state_dict().values() if value.is_floating_point()} <= set(WIDE)
    assert {g.dtype for step in run.gradients for g in step} == {torch.float32}
    for optimizer in run.trainer.optimizers:
        moments = {m.dtype for state in optimizer.state.values() for m in state.values()}
        assert moments == {torch.float32}
    for ema in run.trainer.callbacks:
        for values in getattr(ema, "_values", {}).values():
            assert {value.dtype for value in values.values()} == {torch.float32}


def test_estimates_and_their_differences_keep_what_bfloat16_would_round():
    class Half(torch.nn.Module):
        def forward(self, x, noise, labels=None):
            return x.to(torch.bfloat16) * 0

    from stillhouse.diffusion.preconditioning import EDM

    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8) * (1 + 2**-12)
    sigma = torch.tensor([0.1 + 2**-14])
    plain = Denoiser(Half(), EDM())(x, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Denoiser(Half(), EDM())(x, sigma)
        gradient = losses.score_gradient(x, plain, mixed * (1 + 2**-20), "dmd")
    assert torch.equal(plain, mixed)
    assert gradient.dtype == torch.float32
    assert gradient.any()


def test_metrics_in_training_are_those_of_the_same_weights_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Samples(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.low = torch.is_autocast_enabled("cpu")
            self.drawn = pl_module.sample(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))

    samples = Samples()
    same_layout = {"trainer.channels_last": False}  # after training the networks have the usual one again
    method = train("diff_instruct", {"trainer.precision": "bf16-mixed"} | same_layout, samples).method
    assert not samples.low
    assert torch.equal(samples.drawn, method.sample(torch.ones(2, 1, 8, 8), torch.tensor([0, 1])))


@pytest.mark.parametrize(
    "name", ["diff_instruct", *(pytest.param(name, marks=pytest.mark.slow) for name in ("disback", "sfd"))]
)
def test_frozen_weights_that_are_rounded_once_train_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise, label = torch.ones(2, 1, 8, 8), torch.tensor([0, 1])
    seen = set()

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            (teacher,) = pl_module.frozen_networks()
            network = teacher.denoiser.network
            seen.update((network.stem.weight.dtype, network.embed.layer1.weight.dtype, network.stem.bias.dtype))
            seen.add(teacher.sample(noise, label, steps=2).dtype)  # a callback is outside of autocast
            teacher._hash = None
            seen.add(teacher.hash)

    changes = {"trainer.precision": "bf16-mixed"} | (
        {"method.nodes": 2, "method.interval": 1} if name == "disback" else {}
    )
    rounded = train(name, changes, Look()).method
    (teacher,) = rounded.frozen_networks()
    network = teacher.denoiser.network
    assert seen >= {torch.float32, torch.bfloat16}
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    teacher._hash = None
    assert teacher.hash in seen
    if name == "disback":  # its last target is the teacher, put there in the middle of the training
        assert teacher.hash == rounded.teacher.hash
    monkeypatch.setattr(Teacher, "round_weights", lambda self, dtype: None)
    plain = train(name, changes | {"name": "plain"}).method
    assert all(torch.equal(a, b) for a, b in zip(rounded.parameters(), plain.parameters(), strict=True))


# -- what a device lacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "device", "capability", "message"),
    [
        (
            "tf32",
            "cpu",
            (0, 0),
            "tf32 needs an NVIDIA GPU of compute capability 8.0 .* a CPU: set trainer.precision=32-true",
        ),
        ("tf32", "cuda", (7, 5), "tf32 needs .* a GPU of capability 7.5: set trainer.precision=32-true"),
        ("16-mixed", "cpu", (0, 0), "16-mixed needs an NVIDIA GPU, and this is a CPU: set .*bf16-mixed or 32-true"),
        ("bf16-mixed", "cuda", (7, 0), "bf16-mixed needs .* 8.0 .* 7.0: set trainer.precision=16-mixed or 32-true"),
        (
            "64-true",
            "cuda",
            (9, 0),
            "trainer.precision must be one of 32-true, tf32, bf16-mixed, 16-mixed, got '64-true'",
        ),
    ],
)
def test_refused(precision, device, capability, message):
    with pytest.raises(ValueError, match=message):
        check_precision(precision, device, capability)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_recent_gpu_has_all(precision):
    check_precision(precision, "cuda", (9, 0))


def test_a_gan_is_not_trained_with_a_loss_scale():
    cfg = config("diff_instruct", {"method.gan": {"generator": 0.1, "fake": 0.1, "sigmas": "${noise_levels.karras}"}})
    method = build_seeded(cfg.method, 0)
    with pytest.raises(
        ValueError, match=r"16-mixed would lose the gradient that method.gan .* set trainer.precision=bf16-mixed"
    ):
        precision_plugin("16-mixed", "cuda", method)
    assert type(precision_plugin("tf32", "cuda", method)) is Precision


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({"precision": "tf32"}, [True, True, True]),
        ({"benchmark": False}, [False, False, False]),
        ({"deterministic": "warn"}, [False, False, False]),
    ],
)
def test_faster_kernels_are_for_training_steps_alone(options, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.run.trainer_options.device_kind", lambda accelerator: ("cuda", (8, 0)))
    backends = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    backends += [(torch.backends.cudnn, "benchmark")]
    before = [getattr(*backend) for backend in backends]
    seen = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_):
            seen["step"] = [getattr(*backend) for backend in backends]

        def on_train_batch_end(self, *_):
            seen["after"] = [getattr(*backend) for backend in backends]

    try:
        run = train("sfd", {f"trainer.{option}": value for option, value in options.items()}, Look())
        assert any(isinstance(callback, TrainingKernels) for callback in run.trainer.callbacks)
        assert seen == {"step": inside, "after": [False, False, False]}
        cfg = config("sfd", {})
        torch.backends.cudnn.allow_tf32 = True  # torch's own default
        build_trainer(cfg, build_seeded(cfg.method, 0), RunFolder(cfg.folder))
        assert [getattr(*backend) for backend in backends] == [False, False, False]
    finally:
        torch.use_deterministic_algorithms(False)
        for (owner, name), value in zip(backends, before, strict=True):
            setattr(owner, name, value)


# -- a scaled loss ----------------------------------------------------------------------------------------------------


def scaled(monkeypatch, scale):
    """16-mixed as on a GPU, with its loss scale, but in bfloat16, which this CPU has."""

    def plugin(*_):
        found = TrainingAutocast("bf16-mixed", "cpu")
        found.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        return found

    monkeypatch.setattr("launch.run.trainer_options.precision_plugin", plugin)


@pytest.mark.parametrize(
    "changes", [{}, {"method.clip": 1e-3}, {"method.two_sided": True, "method.clip": 1e-3}], ids=str
)
def test_a_loss_scale_changes_nothing_but_is_undone_before_clipping(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = changes | {"trainer.micro_batch": 3, "method.kimg": 0.02, "method.lr": 1e-2}
    plain = train("diff_instruct", changes | {"trainer.precision": "bf16-mixed", "trainer.channels_last": False})
    scaled(monkeypatch, 2.0**12)
    other = train("diff_instruct", changes)
    assert plain.trainer.global_step == other.trainer.global_step == 4
    for (name, a), b in zip(plain.method.state_dict().items(), other.method.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert other.trainer.precision_plugin.scaler.get_scale() == 2.0**12


@pytest.mark.parametrize(
    ("two_sided", "overflows"), [(False, 1), (True, 2)]
)  # at first the generator's gradient is zero
def test_a_step_that_overflows_is_left_out_and_the_scale_falls(two_sided, overflows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"method.two_sided": two_sided, "method.clip": 1.0}
    scaled(monkeypatch, 2.0**127)
    cfg = config("diff_instruct", changes)
    before = build_seeded(cfg.method, cfg.seed).state_dict()
    run = train("diff_instruct", changes | {"method.lr": 1e-2})
    for name, value in run.method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert run.trainer.precision_plugin.scaler.get_scale() == 2.0 ** (127 - overflows)
    run.trainer.save_checkpoint("last.ckpt")
    stored = torch.load("last.ckpt", weights_only=True)
    assert stored["TrainingAutocast"]["scale"] == 2.0 ** (127 - overflows)
