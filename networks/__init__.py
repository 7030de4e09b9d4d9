"""Raw networks and their weights on disk; no Lightning, no Hydra."""

from networks.dhariwal_unet import DhariwalUNet
from networks.discriminator import Discriminator
from networks.song_unet import SongUNet
from networks.weights import find_weights, hash_state, load_weights, read_card, save_weights

__all__ = [
    "DhariwalUNet",
    "Discriminator",
    "SongUNet",
    "find_weights",
    "hash_state",
    "load_weights",
    "read_card",
    "save_weights",
]
