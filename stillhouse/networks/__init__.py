"""Architectures, and what wraps them: branches of the output, conditions, compilation, a discriminator, LPIPS.

Every network here is a `Network`, which can be read by a `Denoiser`.
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
from stillhouse.networks.edm2_unet import EDM2UNet
from stillhouse.networks.mlp import MLP
from stillhouse.networks.network import Network
from stillhouse.networks.second_time import condition_on_second_time
from stillhouse.networks.song_unet import SongUNet
from stillhouse.networks.step_condition import condition_on_steps, fixed_steps_state, set_steps

__all__ = [
    "MLP",
    "BranchedConv2d",
    "DhariwalUNet",
    "DiffusersUNet",
    "Discriminator",
    "EDM2UNet",
    "Network",
    "SongUNet",
    "branches_of",
    "collapse",
    "condition_on_second_time",
    "condition_on_steps",
    "fixed_steps_state",
    "plain_state",
    "reading_all",
    "respread",
    "set_steps",
    "widen",
]
