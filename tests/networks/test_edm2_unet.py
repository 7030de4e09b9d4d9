"""EDM2's network: magnitudes are kept, weights count by their directions alone. Its outputs are compared with a file's."""

import pytest
import pytorch_lightning as pl
import torch
from network_tools import inputs, tiny
from torch.utils.data import DataLoader

from closed_forms import fit
from lightning_modules import Method
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import EDM
from stillhouse.diffusion.sampling import one_step_sampling
from stillhouse.networks import EDM2UNet
from stillhouse.networks.edm2_unet import MPConv, mp_cat, mp_silu, mp_sum, normalised_layers, unit_magnitude


def rms(x):
    return x.square().mean().sqrt().item()


@torch.no_grad()
def test_operations_keep_unit_magnitude():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, channels, 32, 32, generator=generator) for channels in (64, 64))
    for out in (mp_silu(a), mp_sum(a, b, 0.3), mp_cat(a, b[:, :16], 0.5), unit_magnitude(7 * a, 1)):
        assert rms(out) == pytest.approx(1, abs=0.01)
    halves = mp_cat(a, b[:, :16], 0.5)
    shares = [halves[:, :64].square().sum(), halves[:, 64:].square().sum()]
    assert shares[0] / shares[1] == pytest.approx(1, abs=0.01)  # whatever the number of channels
    torch.manual_seed(0)
    for kernel, x in ((0, a[:, :, 0, 0]), (1, a), (3, a)):
        assert rms(MPConv(64, 256, kernel)(x)) == pytest.approx(1, abs=0.03)


@torch.no_grad()
def test_weights_count_by_direction_and_normalising_changes_no_output():
    network = tiny("edm2")
    given = inputs(network)
    for layer in normalised_layers(network):
        layer.normalise()
    before = network(*given)
    for layer in normalised_layers(network):
        layer.weight.mul_(torch.rand(len(layer.weight), *[1] * (layer.weight.ndim - 1)) * 9 + 1)
    torch.testing.assert_close(network(*given), before, rtol=5e-3, atol=5e-3)
    for layer in normalised_layers(network):
        layer.normalise()
        assert layer.weight.flatten(1).square().mean(1).sqrt().sub(1).abs().max() < 2e-4
    torch.testing.assert_close(network(*given), before, rtol=5e-3, atol=5e-3)
    assert not EDM2UNet(8, 1, 1, model_channels=16, channels_per_head=8, attn_resolutions=()).eval()(*given[:2]).any()


class Toy(Method):
    """Brings a tiny network's outputs to one image."""

    def __init__(self):
        super().__init__(name="toy", batch_size=4, seed=0, kimg=0.012, lr=0.1)
        self.student = Denoiser(tiny("edm2", num_classes=0), EDM())

    def loss(self, batch):
        return self.student(batch["image"], torch.tensor(1.0)).square().mean()

    def sampling(self, nfe=None):
        return one_step_sampling(self.student, 1.0)


class Images(pl.LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = [{"image": torch.randn(4, 1, 8, 8, generator=generator)} for _ in range(3)]
        return DataLoader(batches, batch_size=None)


def test_training_normalises_weights_before_each_step():
    """And after a step they have moved: averages and checkpoints hold what the optimiser made."""
    module, before, after = Toy(), [], []

    class Magnitudes(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            after.append(rms(module.student.network.conv_out.weight.detach()))

    module.student.network.register_forward_pre_hook(
        lambda network, _: before.append(rms(network.conv_out.weight.detach()))
    )
    fit(module, Images(), Magnitudes())
    assert before == pytest.approx([1, 1, 1], abs=2e-3)
    assert max(abs(value - 1) for value in after) > 3e-3
