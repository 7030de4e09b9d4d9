"""Diff-Instruct against the known integral KL between Gaussians, and its turns, labels, options and misuse."""

import itertools

import pytest
import torch
from torch import nn

from closed_forms import MEANS, CorrectedByLevel, ExactNetwork, Mixture, energy_distance, exact_teacher, fit
from lightning_modules import DiffInstruct
from stillhouse.diffusion.losses import denoising_score_matching, score_gradient
from stillhouse.diffusion.noise_levels import KarrasGrid, LogNormal
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.diffusion.training_noise import TrainingNoise
from stillhouse.networks import SongUNet

DISTRIBUTION = LogNormal(-1.2, 1.2)
OPTIONS = {"sigma_init": 2.5, "generator_sigmas": DISTRIBUTION, "fake_sigmas": DISTRIBUTION, "betas": (0.0, 0.999)}


def method(teacher=None, kimg=1.0, lr=1e-3, batch_size=128, seed=0, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=CorrectedByLevel)
    common = {"name": "diff_instruct", "batch_size": batch_size, "seed": seed, "kimg": kimg, "lr": lr}
    return DiffInstruct(teacher, **common, **(OPTIONS | options))


def batch(count, first=0):
    return {"position": torch.arange(first, first + count)}


def loss_of(module, names, data):
    """The loss of an update of the networks `names`, outside of a trainer."""
    module.update_cycle = [names]
    return module.loss(data)


STUDENT, FAKE, BOTH = ("student",), ("fake_score",), ("student", "fake_score")


# -- the gradient -----------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """G(z) = mean + scale z: the Gaussian generator whose KL to another Gaussian is known."""

    def __init__(self, mean, scale, sigma_init):
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(scale))
        self.preconditioning, self.sigma_init = EDM(), sigma_init
        self.network = ExactNetwork("edm", Mixture())

    def forward(self, x, sigma, labels=None):
        return self.mean[:, None, None] + self.scale * x / self.sigma_init


class Exact(nn.Module):
    """The denoiser of N(mean, std^2 I)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mixture = Mixture(torch.tensor([mean], dtype=torch.float64), std)

    def forward(self, x, sigma, labels=None):
        return self.mixture(x, sigma)


def test_the_generators_gradient_is_that_of_the_integral_kl():
    """sigma^2-weighted KL of N(mu, t^2 + sigma^2) to N(m, s^2 + sigma^2), differentiated by mu and by t.

    KL has the derivatives (mu - m) / (s^2 + sigma^2) and 2 t (1 / (s^2 + sigma^2) - 1 / (t^2 + sigma^2)) for 2 pixels.
    """
    mu, t, m, s = [0.4, -0.3], 0.5, [-0.2, 0.1], 0.2
    teacher = exact_teacher(Mixture(torch.tensor([m], dtype=torch.float64), s))
    module = method(teacher)
    module.student, module.fake_score = Affine(mu, t, 2.5), Exact(mu, t)
    loss_of(module, STUDENT, batch(400_000)).backward()
    levels = DISTRIBUTION((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).double()
    by_mean = ((levels**2 / (s**2 + levels**2)).mean() * (torch.tensor(mu) - torch.tensor(m))).float()
    by_scale = (2 * t * levels**2 * (1 / (s**2 + levels**2) - 1 / (t**2 + levels**2))).mean().item()
    torch.testing.assert_close(module.student.mean.grad, by_mean, rtol=0.02, atol=0)
    assert module.student.scale.grad.item() == pytest.approx(by_scale, rel=0.02)


def test_dmd_weighting_divides_by_the_distance_to_the_targets_estimate():
    images, fake, target = torch.randn(3, 5, 2, 4, 4).unbind()
    plain = score_gradient(images, fake, target, "edm")
    assert torch.equal(plain, fake - target)
    for i in range(5):
        size = (images[i] - target[i]).abs().mean()
        torch.testing.assert_close(score_gradient(images, fake, target, "dmd")[i], plain[i] / size / 32)


def test_the_fake_scores_loss_is_denoising_score_matching_of_generated_images():
    module = method()
    loss = loss_of(module, FAKE, batch(8))
    random = TrainingNoise(0, torch.arange(8), (2, 1, 1))
    images = module.student(2.5 * random.latents, torch.tensor(2.5)).detach()
    sigma, noise = random.sigma(DISTRIBUTION), random.noise
    expected = denoising_score_matching(module.fake_score, images, sigma, noise).mean()
    torch.testing.assert_close(loss, expected)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"kimg": 64, "lr": 1.5e-3}, "32-true"),
        pytest.param({"two_sided": True, "kimg": 76.8}, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(
            {"weighting": "dmd", "sigma_init": 80.0, "fake_updates": 2, "fake_lr_factor": 2},
            "32-true",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["alternating", "two-sided in bf16-mixed", "dmd from 80"],
)
def test_it_learns_the_mixture(options, precision):
    """Of the energy distance to the mixture that the untrained generator has, under a tenth is left."""
    module = method(**({"kimg": 102.4} | options))
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, None, precision=precision)
    after = energy_distance(module.sample(noise), real)
    assert before > 0.2
    assert after < 0.1 * before


# -- updates ----------------------------------------------------------------------------------------------------------


def snapshots(module):
    """Fills the list that it returns: after each step copies of both networks' weights, and the counts."""
    kept = []
    original = module.training_step

    def step(batch, batch_idx):
        loss = original(batch, batch_idx)
        copies = {name: [p.detach().clone() for p in getattr(module, name).parameters()] for name in BOTH}
        kept.append((copies, module.trainer.global_step, module.student_updates, module.student_updated))
        return loss

    module.training_step = step
    return kept


def differs(a, b, name):
    return any(not torch.equal(x, y) for x, y in zip(a[0][name], b[0][name], strict=True))


@pytest.mark.parametrize("fake_updates", [1, 3])
def test_each_update_moves_its_own_network_alone(fake_updates):
    """One step is one update; the fake score's come first; the teacher never moves."""
    module = method(fake_updates=fake_updates, kimg=1.024)  # 8 steps
    teacher = module.teacher.hash
    kept = snapshots(module)
    fit(module, None)
    assert [step for _, step, _, _ in kept] == list(range(1, 9))
    cycle = fake_updates + 1
    for before, after in itertools.pairwise(kept):
        generators = after[1] % cycle == 0
        assert differs(before, after, "student") is after[3] is generators
        assert differs(before, after, "fake_score") is not generators
        assert after[2] == after[1] // cycle
    module.teacher._hash = None
    assert module.teacher.hash == teacher


def test_two_sided_is_both_gradients_at_once():
    """The single backward pass gives the generator and the fake score what two separate ones give at the same weights."""
    shared = method(two_sided=True)
    with torch.no_grad():
        for network in (shared.student.network, shared.fake_score.network):
            for p in network.last.parameters():
                p.normal_(std=0.1)
    images = {"position": torch.arange(16)}
    networks = shared.student, shared.fake_score
    loss_of(shared, BOTH, images).backward()
    both = [[p.grad for p in network.parameters() if p.grad is not None] for network in networks]
    shared.zero_grad()
    for names, part, expected in zip((STUDENT, FAKE), networks, both, strict=True):
        loss_of(shared, names, images).backward()
        assert len(expected) > 0
        for p, gradient in zip((p for p in part.parameters() if p.grad is not None), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_two_sided_steps_both_and_counts_one():
    module = method(two_sided=True, kimg=0.512)  # 4 steps
    kept = snapshots(module)
    fit(module, None)
    assert [(step, updates) for _, step, updates, _ in kept] == [(n, n) for n in range(1, 5)]
    for before, after in itertools.pairwise(kept):
        assert differs(before, after, "student")
        assert differs(before, after, "fake_score")


def test_learning_rates_and_clipping():
    module = method(fake_lr_factor=5, lr=1e-3, clip=1e-3, kimg=0.256, warmup_kimg=0.512)
    norms = []
    original = nn.utils.clip_grad_norm_

    def clipped(parameters, limit):
        parameters = list(parameters)
        original(parameters, limit)
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    nn.utils.clip_grad_norm_ = clipped
    try:
        trainer = fit(module, None)
    finally:
        nn.utils.clip_grad_norm_ = original
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([5e-4, 25e-4])  # half of the ramp
    assert len(norms) == 2
    assert max(norms) <= 1.001e-3


# -- labels -----------------------------------------------------------------------------------------------------------


def unet(num_classes=3, resolution=8):
    torch.manual_seed(0)
    options = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
    network = SongUNet(resolution, 1, 1, num_classes=num_classes, dropout=0.3, **options)
    return Teacher("random", network, EDM(), karras, steps=4)


def test_uniform_labels_reach_all_three_networks():
    module = method(unet())
    seen = []
    for denoiser in (module.student, module.fake_score, module.teacher.denoiser):
        denoiser.network.register_forward_hook(lambda net, args, out: seen.append((args[2], net.training)))
    loss_of(module, STUDENT, batch(3000))
    assert len(seen) == 3
    assert all(torch.equal(labels, seen[0][0]) for labels, _ in seen)
    assert not any(training for _, training in seen)  # dropout would make the two scores differ
    assert (torch.bincount(seen[0][0]) / 3000 - 1 / 3).abs().max() < 0.03


def test_data_labels():
    module = method(unet(), labels="data")
    labels = torch.tensor([2, 0, 1, 1])
    seen = []
    module.fake_score.network.register_forward_hook(lambda net, args, out: seen.append(args[2]))
    loss_of(module, FAKE, batch(4) | {"label": labels})
    assert torch.equal(seen[0], labels)


# -- the classifier ---------------------------------------------------------------------------------------------------

GAN = {"generator": 3.0, "fake": 10.0, "sigmas": KarrasGrid(first=0, last=999)}


def test_the_classifiers_gradient_reaches_the_generator_alone_and_points_to_real_images():
    module = method(unet(), gan=GAN)
    data = batch(16) | {"image": torch.randn(16, 1, 8, 8), "label": torch.zeros(16, dtype=torch.int64)}
    loss_of(module, STUDENT, data).backward()
    assert any(p.grad is not None for p in module.student.parameters())
    assert all(p.grad is None for part in (module.fake_score, module.gan) for p in part.parameters())
    images, random = torch.randn(16, 1, 8, 8), TrainingNoise(0, data["position"], (1, 8, 8))
    noise = (random.gan_sigma(GAN["sigmas"]), random.gan_noise)
    logits = lambda x: module.gan.logits(module.fake_score, x, *noise, data["label"])  # noqa: E731
    gradient, loss = module.gan.image_gradient(module.fake_score, images, random, data["label"])
    with torch.no_grad():
        assert logits(images - 1e-1 * gradient).mean() > logits(images).mean()
        torch.testing.assert_close(loss, torch.nn.functional.softplus(-logits(images)).mean())


def test_the_classifier_learns_to_tell_real_from_generated_images():
    module = method(unet(), gan=GAN)
    optimizer = torch.optim.Adam([*module.fake_score.parameters(), *module.gan.parameters()], 1e-3)
    losses = []

    for i in range(40):
        real = 0.5 + 0.1 * sample_noise(torch.arange(16) + 16 * i, (1, 8, 8))
        data = batch(16, 16 * i) | {"image": real, "label": torch.zeros(16, dtype=torch.int64)}
        optimizer.zero_grad()
        loss_of(module, FAKE, data).backward()
        optimizer.step()
        losses.append(module.means["loss/gan_fake"].item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_only_a_classifier_or_data_labels_need_images():
    class Images:
        num_classes = 3

    images = Images()
    assert method(unet(), gan=GAN).training_data(images) is images
    assert method(unet(), labels="data").training_data(images) is images
    data_free = method(unet())
    assert data_free.training_data(images) is not images
    assert data_free.data is images


# -- precision --------------------------------------------------------------------------------------------------------


def test_under_autocast_only_the_networks_are_in_low_precision():
    """The difference of two close scores would drown in bfloat16's rounding."""
    module = method(unet())
    inside, seen = [], {}
    module.fake_score.network.stem.register_forward_hook(lambda net, args, out: inside.append(out.dtype))
    module.log_generator = lambda images, gradient, fake, target, sigma: seen.update(locals())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(module, STUDENT, batch(4))
    assert inside == [torch.bfloat16]
    assert {seen[name].dtype for name in ("images", "gradient", "fake", "target", "sigma")} == {torch.float32}
    assert loss.dtype == torch.float32
    assert torch.equal(seen["gradient"], seen["fake"] - seen["target"])


# -- diagnostics and misuse -------------------------------------------------------------------------------------------


def test_diagnostics_mean_what_they_say():
    """With the target's exact score as fake score there is no mismatch and no lead; images of one value have no spread."""
    module = method(batch_size=2)
    loss_of(module, STUDENT, batch(64))
    logged = lambda: module.metrics(module.means)  # noqa: E731
    assert logged()["loss/mismatch"] == 0
    assert logged()["score/lead"] == 0
    assert logged()["score/image_gradient"] == 0
    images = torch.tensor([-1.5, 0.5]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    zero, sigma = torch.zeros_like(images), torch.ones(2)
    module.log_generator(images, torch.full_like(images, 3.0), images, zero, sigma)
    weight = (1 + 0.25) / 0.25  # EDM's lambda at sigma = 1
    assert logged()["loss/mismatch"].item() == pytest.approx(weight * (2 * 1.5**2 + 2 * 0.5**2) / 2)
    assert logged()["score/lead"] == 1  # the fake score fits exactly
    assert logged()["score/image_gradient"].item() == pytest.approx(3 * 2**0.5)
    assert logged()["generator/mean"].item() == pytest.approx(-0.5)
    assert logged()["generator/std"].item() == pytest.approx(2**0.5)
    assert logged()["generator/saturation"].item() == 0.5


def test_sampling_is_one_evaluation_at_sigma_init():
    module = method(sigma_init=7.0)
    noise = sample_noise(torch.arange(8), (2, 1, 1))
    torch.testing.assert_close(module.sample(noise), Mixture(MEANS)(7 * noise, torch.tensor(7.0)), rtol=0, atol=1e-5)
    assert module.nfe == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_init": 100}, "method.sigma_init=100 lies outside of the teacher's noise levels, 0.002 to 80"),
        ({"sigma_init": 0}, "method.sigma_init=0 lies outside of the teacher's noise levels"),
        ({"weighting": "sid"}, "method.weighting must be one of edm, dmd, got 'sid'"),
        ({"labels": "none"}, "method.labels must be one of uniform, data, got 'none'"),
        ({"fake_updates": 0}, "method.fake_updates must be an integer of at least 1, got 0"),
        ({"fake_lr_factor": -1}, "method.fake_lr_factor must be a positive number, got -1"),
        ({"clip": 0}, "method.clip must be a positive number, got 0"),
        ({"two_sided": True, "fake_updates": 2}, "method.two_sided shares one noise between both updates"),
        ({"two_sided": True, "fake_sigmas": LogNormal(0)}, "method.two_sided shares one noise between both updates"),
        ({"gan": GAN | {"fake": 0}}, "method.gan.fake must be a positive number, got 0; method.gan=null: no GAN"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(unet() if "gan" in options else None, **options)
