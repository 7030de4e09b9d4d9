"""DMD2 against Diff-Instruct, the sampler and closed forms: its steps, their inputs, its divergences, and misuse."""

import pytest
import torch
from test_diff_instruct import FAKE, GAN, STUDENT, batch, loss_of, unet

from closed_forms import CorrectedByLevel, Mixture, MixtureData, energy_distance, exact_teacher, fit
from lightning_modules import DMD2, DiffInstruct
from stillhouse.diffusion.noise_levels import KarrasGrid
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import karras_grid
from stillhouse.diffusion.training_noise import TrainingNoise

LEVELS = KarrasGrid(first=0, last=999)
OPTIONS = {"sigma_init": 80.0, "generator_sigmas": KarrasGrid(), "fake_sigmas": LEVELS, "betas": (0.9, 0.999)}


def method(teacher=None, cls=DMD2, kimg=1.0, lr=1e-3, batch_size=128, seed=0, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=CorrectedByLevel)
    common = {"name": "dmd2", "batch_size": batch_size, "seed": seed, "kimg": kimg, "lr": lr}
    return cls(teacher, **common, **(OPTIONS | options))


def images_of(count, first=0):
    """A batch with real images of three classes, 1x8x8."""
    noise = sample_noise(torch.arange(first, first + count) + 1000, (1, 8, 8))
    return batch(count, first) | {"image": 0.5 + 0.1 * noise, "label": torch.arange(first, first + count) % 3}


def noise_of(module, data):
    return TrainingNoise(module.seed, data["position"], module.image_shape)


def gradients(module, names, data):
    """The loss and the gradients of all trained networks."""
    module.zero_grad()
    loss = loss_of(module, names, data)
    loss.backward()
    weights = [p for network in module.trained_networks().values() for p in network.parameters()]
    return [loss.detach()] + [p.grad for p in weights if p.grad is not None]


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["simulated", "noised"])
def test_one_step_is_diff_instruct_bit_for_bit(inputs):
    ours = method(unet(), gan=GAN, inputs=inputs)
    plain = method(unet(), DiffInstruct, gan=GAN, weighting="dmd", fake_updates=5)
    assert ours.update_cycle == plain.update_cycle
    for names in (STUDENT, FAKE):
        theirs = gradients(plain, names, images_of(8))
        assert len(theirs) > 1
        for a, b in zip(gradients(ours, names, images_of(8)), theirs, strict=True):
            assert torch.equal(a, b)
    assert ours.evaluations == plain.evaluations
    assert ours.sampling() == plain.sampling()


def differing(teacher):
    """A student that is not its teacher."""
    module = method(teacher, steps=3, levels=[5.0, 0.8])
    with torch.no_grad():
        for weights in module.student.parameters():
            weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    return module


@pytest.mark.parametrize("network", ["mixture", "unet"])
def test_simulated_inputs_are_the_samplers_states(network):
    """The images of training at step i are those of a sample of i steps, to the last bit, and all steps are as frequent."""
    module = differing(unet() if network == "unet" else None)
    data = batch(48)
    noise = noise_of(module, data)
    labels = noise.labels(module.teacher.num_classes)
    step = noise.step(3)
    assert torch.bincount(step, minlength=3).min() > 8
    with torch.no_grad():
        images = module.generate(data, noise, labels)
    for i in range(3):
        sampled = module.sample(noise.latents, labels, module.sampling(i + 1))
        assert torch.equal(images[step == i], sampled[step == i])


def test_noised_inputs_are_noise_and_real_images_with_noise():
    module = method(unet(), steps=3, inputs="noised", labels="data", levels=[5.0, 0.8])
    data = images_of(24)
    noise = noise_of(module, data)
    step, scale = noise.step(3), [80.0, 5.0, 0.8]
    x, sigma = module.student_input(data, noise, data["label"])
    torch.testing.assert_close(sigma, torch.tensor(scale)[step])
    shown = torch.where((step > 0)[:, None, None, None], data["image"], 0)
    torch.testing.assert_close(x, shown + sigma[:, None, None, None] * noise.latents)
    images = MixtureData(24)
    assert method(steps=2, inputs="noised").training_data(images) is images
    assert method(steps=2).training_data(images) is not images


@pytest.mark.parametrize("inputs", ["simulated", "noised"])
def test_equal_scores_have_no_gradient(inputs):
    module = method(steps=3, inputs=inputs)  # the fake score begins as the teacher
    data = batch(8) | {"image": torch.zeros(8, 2, 1, 1)}
    _, *found = gradients(module, STUDENT, data)
    assert found
    assert max(g.abs().max() for g in found) < 1e-8


def test_samples_take_as_many_steps_as_are_trained_or_fewer():
    module = method(steps=4)
    assert module.levels == karras_grid(4, 0.002, 80.0)[:-1].tolist()
    assert [module.sampling(n).nfe for n in (None, 1, 2, 4)] == [4, 1, 2, 4]
    assert module.sampling(2).sigmas == [*module.levels[:2], 0.0]
    with pytest.raises(ValueError, match="steps=5: the student takes 4, 3, 2, 1, and no other number"):
        module.sampling(5)
    shared = {"student": 1.0, "fake score": 1.0, "teacher": 1 / 6}
    assert module.evaluations == shared | {"student without gradient": 3.0}
    assert method(steps=4, inputs="noised").evaluations == shared
    assert method(unet(), steps=2, gan=GAN, divergence="js").evaluations == shared | {
        "fake score's encoder": 12 / 6,
        "student without gradient": 1 + 2 / 6,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "precision"),
    [({"inputs": "simulated"}, "32-true"), ({"inputs": "simulated"}, "bf16-mixed"), ({"inputs": "noised"}, "32-true")],
)
def test_two_steps_learn_the_mixture(options, precision):
    """Of the energy distance to the mixture that the untrained generator has, under a tenth is left after one step and two."""
    module = method(kimg=204.8, steps=2, levels=[1.0], fake_updates=2, fake_lr_factor=2, **options)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    distances = lambda: [energy_distance(module.sample(noise, None, module.sampling(n)), real) for n in (1, 2)]  # noqa: E731
    before = distances()
    fit(module, MixtureData(128), precision=precision)
    print(before, distances())
    assert before[0] > 0.2
    assert max(distances()) < 0.1 * before[0]


# -- divergences ------------------------------------------------------------------------------------------------------


def test_a_classifier_that_knows_nothing_weighs_all_samples_alike():
    """All but the classifier's last layer are of no use; the gradient is that of DMD2, to rounding."""
    ours, plain = (method(unet(), gan=GAN, divergence=name) for name in ("forward_kl", "reverse_kl"))
    data = images_of(16)
    for module in (ours, plain):
        with torch.no_grad():
            for weights in module.gan.discriminator.layers[-1].parameters():
                weights.zero_()
            for weights in module.fake_score.network.stem.parameters():
                weights.mul_(1.1)  # or there is no gradient
        module.update_cycle = [STUDENT]
    for a, b in zip(gradients(ours, STUDENT, ours.prepare(data)), gradients(plain, STUDENT, data), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert ours.metrics(ours.means)["divergence/effective_share"] == pytest.approx(1)


def test_each_samples_gradient_has_the_weight_of_its_density_ratio():
    """Of samples at one noise level, whose classifier's logit is set: h(r / mean r) over the mean of h."""
    module = method(unet(), gan=GAN, divergence="js", ratio_ema=0.5, generator_sigmas=KarrasGrid(first=500, last=500))
    ratio = torch.tensor([0.5, 1.0, 4.0, 50.0])  # the last one is clipped to 20
    module.logits = lambda part: ratio[part["position"]].log()
    module.update_cycle, module.micro_batch = [STUDENT], 3
    prepared = module.prepare(images_of(4))
    bin_ = int(10 * (KarrasGrid(first=500, last=500)(torch.tensor(0.5).double()) - 0.002) / (80 - 0.002))
    mean = 0.5 * 1 + 0.5 * (0.5 + 1 + 4 + 20) / 4
    expected = torch.ones(10, dtype=torch.float64)
    expected[bin_] = mean
    torch.testing.assert_close(module.ratio_means, expected)
    r = torch.tensor([0.5, 1.0, 4.0, 20.0]) / mean
    h = r / (1 + r)
    torch.testing.assert_close(prepared["divergence_weight"], h / h.mean())
    images, fake, target = torch.randn(3, 4, 1, 8, 8).unbind()
    plain = module.matching_gradient({}, images, fake, target)
    weighed = module.matching_gradient(prepared, images, fake, target)
    torch.testing.assert_close(weighed, (h / h.mean())[:, None, None, None] * plain)
    module.update_cycle = [FAKE]
    assert module.prepare(data := images_of(4)) is data


@pytest.mark.slow
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    """Stopped between two updates of the generator, whose running mean of the density ratio goes on."""

    def fresh(steps):
        module = method(unet(0), gan=GAN, divergence="jeffreys", ratio_ema=0.5, steps=2, batch_size=8, fake_updates=1)
        module.total_steps = steps
        return module

    class Images(MixtureData):
        @staticmethod
        def fetch(position, items):
            noise = sample_noise(torch.arange(position, position + len(items)) + 1000, (1, 8, 8))
            return {"image": 0.5 + 0.1 * noise, "position": torch.arange(position, position + len(items))}

    whole, stopped, resumed = fresh(9), fresh(5), fresh(9)
    fit(whole, Images(8))
    fit(stopped, Images(8)).save_checkpoint(tmp_path / "stopped.ckpt")
    fit(resumed, Images(8), resume=tmp_path / "stopped.ckpt")
    assert not torch.equal(stopped.ratio_means, torch.ones(10))
    assert not torch.equal(stopped.ratio_means, whole.ratio_means)
    assert torch.equal(resumed.ratio_means, whole.ratio_means)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# -- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "method.steps must be an integer of at least 1, got 0"),
        ({"inputs": "real"}, "method.inputs must be one of simulated, noised, got 'real'"),
        ({"steps": 3, "levels": [5.0]}, "method.levels must be the 2 noise levels of the steps after the first one"),
        ({"steps": 3, "levels": [5.0, 6.0]}, r"descending from below method.sigma_init=80, got \[5.0, 6.0\]"),
        ({"steps": 2, "levels": [80.0]}, "descending from below method.sigma_init=80"),
        ({"levels": [5.0]}, "method.levels must be the 0 noise levels"),
        (
            {"steps": 2, "inputs": "noised"},
            "method.inputs=noised takes images with their labels: set method.labels=data",
        ),
        ({"divergence": "kl"}, "method.divergence must be one of reverse_kl, forward_kl, js, .*, got 'kl'"),
        ({"divergence": "js"}, "method.divergence=js takes its density ratio from the classifier: set method.gan"),
        ({"ratio_ema": 1.0}, r"method.ratio_ema must be in \[0, 1\), got 1.0"),
        (
            {"steps": 2, "nodes": 1, "degradation": {"steps": 2, "lr": None, "spacing": "linear"}},
            "method.nodes=1: the degradation path is that of a generator of one step, not of method.steps=2",
        ),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(unet(), **options)
