"""SiDA's two losses against formulas written out here, its delays, and that it learns a mixture whose scores are known."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_diff_instruct import unet
from test_sid import OPTIONS

from closed_forms import CorrectedByLevel, Mixture, MixtureData, energy_distance, exact_teacher, fit
from lightning_modules import SiDA
from stillhouse.checkpoints import save_weights
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.training_noise import TrainingNoise


class Encoding(CorrectedByLevel):
    """The exact network with features that a discriminator can read: those of its correction."""

    def forward(self, z, noise_labels, class_labels=None, augment_labels=None, encoded=False, both=False):
        features = self.layers(torch.cat([z.flatten(1), noise_labels[:, None]], 1))
        output = self.exact(z, noise_labels, class_labels) + self.last(features).reshape(z.shape)
        features = features[:, :, None, None]
        return features if encoded else (output, features) if both else output

    def encode(self, *args):
        return self(*args, encoded=True)


class Placed(SiDA):
    """At a place of the training that a test chooses, without a trainer."""

    nimg = 0


def method(teacher=None, kind=SiDA, kimg=1.0, lr=1e-3, batch_size=128, **options):
    torch.manual_seed(0)
    teacher = teacher or exact_teacher(network=Encoding)
    common = {"name": "sida", "batch_size": batch_size, "seed": 0, "kimg": kimg, "lr": lr, "alpha": 1.0}
    return kind(teacher, **(common | OPTIONS | options))


def random_networks(**options):
    """A method whose three networks differ, and a batch of it."""
    module = method(unet(), kind=Placed, labels="data", gan_weight=0.3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (module.student, module.fake_score, module.target.denoiser):
            for p in network.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    batch = {"position": torch.arange(6), "label": torch.tensor([2, 0, 1, 1, 2, 0])}
    return module, batch | {"image": torch.randn(6, 1, 8, 8, generator=generator)}


def turn(module, batch, name):
    """The loss of a training step that updates the network `name`, after its backward pass."""
    module._step = module.update_cycle.index((name,))
    loss = module.loss(module.prepare(batch))
    loss.backward()
    return loss


def gradients(network):
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_generators_gradient_is_that_of_the_whole_loss(joined, micro_batch):
    module, batch = random_networks(gan_kimg=0.0 if joined else 1.0)
    module.micro_batch = micro_batch
    module._step = 1
    batch = module.prepare(batch)
    for part in module.micro_batches(batch):
        (module._current.share * module.loss(part)).backward()
    assert not gradients(module.fake_score)
    found = gradients(module.student)

    module.zero_grad()
    noise, labels = TrainingNoise(0, batch["position"], (1, 8, 8)), batch["label"]
    y = module.student(2.5 * noise.latents, torch.full((6,), 2.5), labels)
    sigma = noise.sigma(OPTIONS["generator_sigmas"])
    x = y + sigma[:, None, None, None] * noise.noise
    target, fake = module.target.denoiser(x, sigma, labels), module.fake_score(x, sigma, labels)
    logits = module.fake_score.encode(x, sigma, labels).mean(1)
    w = (y - target).detach().abs().mean((1, 2, 3))
    loss = (((target - fake) * (fake - y)).sum((1, 2, 3)) / w).mean()  # alpha is 1
    if joined:
        bce = F.binary_cross_entropy_with_logits(logits.clamp(-10, 10), torch.ones_like(logits))
        loss = 0.5 * loss + 0.5 * (bce / w * 64 * 0.3).mean()
    loss.backward()
    for ours, theirs in zip(found, gradients(module.student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_fake_score_learns_to_classify_at_the_same_level_and_noise():
    module, batch = random_networks()
    loss = turn(module, batch, "fake_score")
    assert not gradients(module.student)
    noise, labels = TrainingNoise(0, batch["position"], (1, 8, 8)), batch["label"]
    sigma = noise.sigma(OPTIONS["fake_sigmas"])
    e = sigma[:, None, None, None] * noise.noise
    with torch.no_grad():
        y = module.student(2.5 * noise.latents, torch.full((6,), 2.5), labels)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        score = (weight * (module.fake_score(y + e, sigma, labels) - y).square().sum((1, 2, 3))).mean()
        generated, real = (module.fake_score.encode(each + e, sigma, labels).mean(1) for each in (y, batch["image"]))
        bce = F.binary_cross_entropy_with_logits
        classified = bce(real, torch.ones_like(real)) + bce(generated, torch.zeros_like(generated))
    torch.testing.assert_close(loss.detach(), score + (weight * classified / 2).mean())
    assert max(g.abs().max() for g in gradients(module.fake_score)) > 1
    before = gradients(module.fake_score)
    module.on_before_optimizer_step(torch.optim.SGD(module.fake_score.parameters(), lr=1.0))
    for ours, theirs in zip(gradients(module.fake_score), before, strict=True):
        torch.testing.assert_close(ours, theirs.clamp(-1, 1), rtol=0, atol=0)


def test_the_generator_waits_while_the_fake_score_learns():
    class Watched(SiDA):
        seen = ()

        def after_update(self):
            super().after_update()
            state = [p.detach().clone() for p in self.student.parameters()]
            self.seen += ((self.updating, self.student_updates, self.nimg >= self.gan_nimg, state),)

    module = method(kind=Watched, kimg=0.056, batch_size=8, generator_kimg=0.02, gan_kimg=0.04)
    fit(module, MixtureData(8))
    names, updates, joined, states = zip(*module.seen, strict=True)
    assert [name for (name,) in names] == ["fake_score"] * 4 + ["student", "fake_score", "student"]
    assert updates == (0, 0, 0, 0, 1, 1, 2)
    assert joined == (False, False, False, False, True, True, True)  # of the step that comes next
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(states)]
    assert changed == [False, False, False, True, False, True]
    cycled = 4 / 7
    assert module.evaluations["teacher"] == pytest.approx(cycled / 2)
    assert module.evaluations["fake score's encoder"] == pytest.approx(1 - cycled / 2)


def test_it_starts_from_a_finished_run_of_the_same_teacher(tmp_path):
    def started(folder):
        module = method(kimg=0.016, batch_size=8, start=str(folder))
        module.setup("fit")
        return module

    other = method().student.network
    with torch.no_grad():
        other.last.bias.add_(1.0)
    card = {"teacher": "mixture", "licence": "unknown"}
    save_weights(tmp_path / "student.safetensors", other.state_dict(), card)
    module = started(tmp_path)
    torch.testing.assert_close(module.student.network.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not module.fake_score.network.last.bias.any()  # as released: the fake score begins as the teacher
    with pytest.raises(
        ValueError, match=r"method.start=nowhere has no student.safetensors: give the folder of a finished"
    ):
        started("nowhere")
    (tmp_path / "student.json").write_text(
        json.dumps(json.loads((tmp_path / "student.json").read_text()) | {"teacher": "t"})
    )
    with pytest.raises(ValueError, match=r"was distilled from teacher t, not from mixture"):
        started(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_the_mixture(precision):
    """Of the energy distance to the mixture that the untrained generator has, a sixth is left: alpha 1 is slower than 1.2."""
    module = method(kimg=51.2, lr=2e-3, generator_kimg=2.56, gan_kimg=5.12)
    real = Mixture().sample(2000, torch.Generator().manual_seed(1))
    noise = sample_noise(torch.arange(2000), (2, 1, 1))
    before = energy_distance(module.sample(noise), real)
    fit(module, MixtureData(128), precision=precision)
    after = energy_distance(module.sample(noise), real)
    print(before, after)
    assert before > 0.2
    assert after < before / 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gan_weight": 0}, "method.gan_weight must be a positive number, got 0"),
        ({"fake_clip": -1.0}, "method.fake_clip must be a positive number, got -1.0"),
        ({"gan_kimg": -1}, "method.gan_kimg must not be negative, got -1"),
        ({"generator_kimg": 1.0}, "method.generator_kimg=1.0 leaves the generator no update"),
        ({"gan": None}, "method.gan is no option of SiD"),
        (
            {
                "start": "runs/a",
                "nodes": 1,
                "degradation": {"steps": 2, "lr": None, "batch_size": 4, "seed": 0, "spacing": "geometric"},
            },
            "method.nodes is a path from the untrained generator",
        ),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
