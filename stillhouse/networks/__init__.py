"""Architectures, and what wraps them: branches of the output, conditions, compilation, a discriminator, LPIPS.

Every network here can be the `network` of a `Denoiser`. It has the attributes `resolution`, `in_channels`, `out_channels`,
`num_classes` and `augment_dim` (0 without), is called with (x, noise_labels, class_labels, augment_labels), and has `encode`,
whose features a discriminator reads, of `encoder_channels` and `encoder_resolution`.
"""

from stillhouse.networks.branching import (
    BranchedConv2d,
    branches_of,
    collapse,
    plain_state,
    reading_all,
    respread,
    widen,
)
from stillhouse.networks.dhariwal_unet import DhariwalUNet
from stillhouse.networks.diffusers_unet import DiffusersUNet
from stillhouse.networks.discriminator import Discriminator
from stillhouse.networks.mlp import MLP
from stillhouse.networks.song_unet import SongUNet
from stillhouse.networks.step_condition import condition_on_steps, fixed_steps_state, set_steps

__all__ = [
    "MLP",
    "BranchedConv2d",
    "DhariwalUNet",
    "DiffusersUNet",
    "Discriminator",
    "SongUNet",
    "branches_of",
    "collapse",
    "condition_on_steps",
    "fixed_steps_state",
    "plain_state",
    "reading_all",
    "respread",
    "set_steps",
    "widen",
]
