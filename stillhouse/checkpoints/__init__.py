"""Weights on disk: published checkpoints in, ours in and out; hashes, downloads, licences."""

from stillhouse.checkpoints.consistency_models import ConsistencyModelCheckpoint
from stillhouse.checkpoints.diffusers_folder import DiffusersFolder
from stillhouse.checkpoints.edm_pickle import EDMPickle
from stillhouse.checkpoints.rectified_flow import RectifiedFlowCheckpoint
from stillhouse.checkpoints.weights import find_weights, hash_state, load_weights, read_card, save_weights

__all__ = [
    "ConsistencyModelCheckpoint",
    "DiffusersFolder",
    "EDMPickle",
    "RectifiedFlowCheckpoint",
    "find_weights",
    "hash_state",
    "load_weights",
    "read_card",
    "save_weights",
]
