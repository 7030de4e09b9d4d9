from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from closed_forms import Mixture, fit
from datamodules import PlanePoints
from datamodules.components.augmentation import augmented
from lightning_modules import Pretrain
from stillhouse.diffusion.losses import denoising_score_matching, log_normal_sigmas
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.diffusion.schedules import karras
from stillhouse.diffusion.teacher import Teacher
from stillhouse.metrics.distances import wasserstein_distance
from stillhouse.metrics.extractors import Points
from stillhouse.metrics.images import to_uint8
from stillhouse.networks import MLP


class PointNetwork(nn.Module):
    """A perceptron of (x, noise level) for images of two pixels."""

    in_channels = out_channels = 2
    resolution = 1
    num_classes = 0
    augment_dim = 9

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        return self.layers(torch.cat([x.flatten(1), noise_labels[:, None]], 1)).reshape(x.shape)


class MixtureImages(pl.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        images = Mixture().sample(self.batch_size * 100, torch.Generator().manual_seed(0)).float()
        batches = [{"image": part} for part in images.split(self.batch_size)]
        return DataLoader(batches, batch_size=None)


def module(**options):
    torch.manual_seed(0)
    schedule = partial(karras, sigma_min=0.02, sigma_max=10.0)
    teacher = Teacher("points", PointNetwork(), EDM(), schedule, steps=12)
    options = {"kimg": 300, "lr": 3e-3, "p_mean": -1.0, "p_std": 1.2} | options
    return Pretrain(teacher, name="pretrain", batch_size=256, seed=0, **options)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_it_learns_the_exact_denoiser_and_samples_the_mixture(precision):
    method = module(kimg=150)
    x0 = Mixture().sample(2000, torch.Generator().manual_seed(5)).float()
    noise = sample_noise(torch.arange(2000), (2, 1, 1))

    def error():
        worst = []
        for sigma in torch.tensor([0.15, 0.4, 1.0]):
            x = x0 + sigma * noise
            gap = method.student(x, sigma) - Mixture()(x, sigma)
            worst.append((gap.square().mean() / (x0 - x0.mean(0)).square().mean()).item())
        return max(worst)

    before = error()
    fit(method, MixtureImages(256), precision=precision)
    after = error()
    assert before > 0.05
    assert after < 0.01  # of the data's variance

    samples = method.sample(noise).flatten(1).double()
    distance, nearest = torch.cdist(samples, Mixture().means).min(1)
    assert (torch.bincount(nearest, minlength=3) / 2000 - 1 / 3).abs().max() < 0.06
    assert distance.square().mean().item() == pytest.approx(2 * 0.2**2, rel=0.25)


def test_its_loss_is_edms():
    """E lambda |D - x0|^2 with lambda = (sigma^2 + sd^2)/(sigma sd)^2, on the step's own random draws."""
    method = module(p_mean=0.0, p_std=0.5)
    method.log = lambda *args, **kwargs: None
    images = Mixture().sample(64, torch.Generator().manual_seed(1)).float()
    torch.manual_seed(3)
    loss = method.loss(method.prepare({"image": images}))
    torch.manual_seed(3)
    sigma = (torch.randn(64) * 0.5).exp()
    noise = torch.empty(64, 2, 1, 1).normal_()
    denoised = method.student(images + sigma[:, None, None, None] * noise, sigma)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight * (denoised - images).square().flatten(1).sum(1)).mean()
    torch.testing.assert_close(loss, expected)


def test_augmented_images_are_its_data_and_the_network_is_told():
    method = module(augment=1.0)
    method.log = lambda *args, **kwargs: None
    told = []
    method.student.network.register_forward_hook(lambda _, args, out: told.append(args[3] if len(args) > 3 else None))
    batch = {"image": Mixture().sample(64, torch.Generator().manual_seed(1)).float(), "position": torch.arange(64)}
    changed = augmented(batch, 1.0, seed=0)
    torch.manual_seed(3)
    loss = method.loss(method.prepare(batch))
    torch.manual_seed(3)
    sigma = log_normal_sigmas(64, -1.0, 1.2, "cpu")
    noise = torch.empty(64, 2, 1, 1).normal_()
    expected = denoising_score_matching(method.student, changed["image"], sigma, noise).mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(told[0], changed["augment"])
    told.clear()
    method.sample(sample_noise(torch.arange(2), (2, 1, 1)))
    assert told == [None] * method.nfe  # which is zeros


def test_sampling_is_in_eval_mode_and_training_mode_returns():
    method = module()
    modes = []
    method.student.register_forward_hook(lambda net, *_: modes.append(net.training))
    method.sample(sample_noise(torch.arange(2), (2, 1, 1)))
    assert not any(modes)
    assert len(modes) == method.nfe == 23
    assert method.student.training


def test_misuse():
    with pytest.raises(ValueError, match="method.p_std must be positive, got 0"):
        module(p_std=0)
    with pytest.raises(ValueError, match="method.augment must be null or a probability"):
        module(augment=0)


@pytest.mark.parametrize("distribution", ["eight_gaussians", "checkerboard"])
@pytest.mark.slow
def test_it_learns_points_of_the_plane_with_the_perceptron_that_they_have(distribution, tmp_path):
    torch.manual_seed(0)
    data = PlanePoints(distribution, root=str(tmp_path), batch_size=256, points=20_000)
    teacher = Teacher(distribution, MLP(1, 2, 2, width=64, num_blocks=2), EDM(), karras, steps=20)
    options = {"name": "pretrain", "batch_size": 256, "seed": 0, "lr": 4e-3, "warmup_kimg": 5}
    method = Pretrain(teacher, kimg=150, **options)
    noise = sample_noise(torch.arange(1000), (2, 1, 1))
    real = Points()(torch.from_numpy(data.reference().images[:1000].copy()))

    def distance(samples):
        return wasserstein_distance(Points()(to_uint8(samples)), real)

    fit(method, data)
    learnt, from_noise = distance(method.sample(noise, None)), distance(0.5 * noise)
    floor = wasserstein_distance(Points()(torch.from_numpy(data.reference().images[1000:2000].copy())), real)
    assert learnt < 0.6 * from_noise
    assert learnt < 2 * floor


def test_a_learned_log_variance_weighs_each_level():
    """Its own gradient is 1 - exp(-u) l, zero where exp(u) is the loss l of a pixel; at u = 0 the network's is EDM's."""
    weighed, plain = module(log_variance=True), module()
    batch = {"image": Mixture().sample(64, torch.Generator().manual_seed(0)).float()}
    torch.manual_seed(1)
    batch = plain.prepare(batch)
    losses = denoising_score_matching(plain.student, batch["image"], batch["sigma"], batch["noise"]).detach()
    loss, reference = weighed.loss(batch), plain.loss(batch)
    torch.testing.assert_close(loss, reference / 2)  # two pixels
    loss.backward()
    reference.backward()
    pairs = zip(weighed.student.parameters(), plain.student.parameters(), strict=True)
    assert all(torch.allclose(ours.grad, 0.5 * theirs.grad, atol=1e-6) for ours, theirs in pairs)
    (bias,) = (p.grad for name, p in weighed.log_variance.named_parameters() if name.endswith("bias"))
    torch.testing.assert_close(bias.item(), 1 - losses.mean().item() / 2, rtol=1e-4, atol=1e-4)
    assert list(weighed.trained_networks()) == ["student", "log_variance"]
    assert weighed.update_cycle == (("student", "log_variance"),)


@pytest.mark.slow
def test_the_log_variance_becomes_the_loss_of_each_level():
    method = module(log_variance=True)
    fit(method, MixtureImages(256))
    x0 = Mixture().sample(4000, torch.Generator().manual_seed(5)).float()
    for level in (0.15, 0.4, 1.0):
        sigma = torch.full((4000,), level)
        with torch.no_grad():
            losses = denoising_score_matching(method.student, x0, sigma, torch.randn_like(x0)) / 2
            u = method.log_variance(sigma[:1]).item()
        assert u == pytest.approx(losses.mean().log().item(), abs=0.15)
