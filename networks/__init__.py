"""Raw networks and their weights on disk; no Lightning, no Hydra."""

from networks.branching import BranchedConv2d, branches_of, collapse, plain_state, reading_all, respread, widen
from networks.dhariwal_unet import DhariwalUNet
from networks.diffusers_folder import DiffusersFolder
from networks.diffusers_unet import DiffusersUNet
from networks.discriminator import Discriminator
from networks.edm_pickle import EDMPickle
from networks.mlp import MLP
from networks.perceptual import LPIPS
from networks.rectified_flow_checkpoint import RectifiedFlowCheckpoint
from networks.song_unet import SongUNet
from networks.step_condition import condition_on_steps, fixed_steps_state, set_steps
from networks.weights import find_weights, hash_state, load_weights, read_card, save_weights

__all__ = [
    "LPIPS",
    "MLP",
    "BranchedConv2d",
    "DhariwalUNet",
    "DiffusersFolder",
    "DiffusersUNet",
    "Discriminator",
    "EDMPickle",
    "RectifiedFlowCheckpoint",
    "SongUNet",
    "branches_of",
    "collapse",
    "condition_on_steps",
    "find_weights",
    "fixed_steps_state",
    "hash_state",
    "load_weights",
    "plain_state",
    "read_card",
    "reading_all",
    "respread",
    "save_weights",
    "set_steps",
    "widen",
]
