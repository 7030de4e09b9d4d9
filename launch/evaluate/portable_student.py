"""A distilled student as a model of diffusers.

`export.py` copies this file, and what it imports of this project, into every exported folder: there it has to do with
torch, numpy and diffusers alone.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.preconditioning import from_description
from stillhouse.diffusion.random_numbers import sample_labels, sample_noise
from stillhouse.diffusion.sampling import Sampling
from stillhouse.networks.dhariwal_unet import DhariwalUNet
from stillhouse.networks.diffusers_unet import DiffusersUNet
from stillhouse.networks.edm2_unet import EDM2UNet
from stillhouse.networks.mlp import MLP
from stillhouse.networks.second_time import condition_on_second_time
from stillhouse.networks.song_unet import SongUNet

NETWORKS = {cls.__name__: cls for cls in (SongUNet, DhariwalUNet, EDM2UNet, DiffusersUNet, MLP)}


class Student(ModelMixin, ConfigMixin):
    """A denoiser and the way in which it makes images of noise; the network sees float32.

    network, preconditioning: {"name": of a class in NETWORKS, or of a preconditioning, and its options}; a network's option
    two_times says that it is conditioned on a second time. sampling: the fields of
    `Sampling`. num_classes: 0 without labels.
    """

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any],
        preconditioning: dict[str, Any],
        sampling: dict[str, Any],
        num_classes: int,
    ):
        super().__init__()
        self.denoiser = Denoiser(_made_network(network), from_description(preconditioning))
        self.path = Sampling(**sampling)
        self.num_classes = num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        network = self.denoiser.network
        return network.in_channels, network.resolution, network.resolution

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The estimate of the clean image, of x at noise level sigma; see `Denoiser`."""
        return self.denoiser(x, sigma, labels)

    def inputs(self, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Noise (B, C, H, W) and labels (B,), or None, of seeds (B,), int64: row i depends on seeds[i] alone."""
        return sample_noise(seeds, self.image_shape), sample_labels(seeds, self.num_classes)

    @torch.no_grad()
    def generate(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), float32 in about [-1, 1], of unit normal noise of that shape and labels (B,), int64, or None."""
        return self.path(self.denoiser.eval(), noise, labels)


def _made_network(config: dict[str, Any]) -> torch.nn.Module:
    options = dict(config)
    two_times = options.pop("two_times", False)
    network = NETWORKS[options.pop("name")](**options)
    if two_times:
        condition_on_second_time(network)
    return network
