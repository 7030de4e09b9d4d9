"""Configs that earlier revisions stored: their names of classes and modules, in the words of today."""

from typing import Any

# The last revision that wrote them, which can finish its own runs: training goes on from a checkpoint of today's engine alone.
REVISION = "0d82877"
# A name that is changed in conf/ or in the Python of what conf/ names has a line here, and is then read of runs made before.
_KEYS = {"law": "distribution", "time_laws": "time_distributions"}
_BRANCHES = {
    "weights": "branch_weights",
    "auxiliary": "branch_auxiliary",
    "fade": "branch_fade",
}  # of methods called BDense...
_MOVED = {
    "datamodules.Planar": "datamodules.PlanePoints",
    "lightning_modules.BDenseProgressive": "lightning_modules.ProgressiveDistillation",
    "lightning_modules.BDenseSFD": "lightning_modules.SFD",
    "lightning_modules.BDenseStudent": "lightning_modules.DenoisingStudent",
    "diffusion.time_laws.": "stillhouse.diffusion.time_distributions.",
    "diffusion.": "stillhouse.diffusion.",
    "metrics.": "stillhouse.metrics.",
    "networks.DiffusersFolder": "stillhouse.checkpoints.DiffusersFolder",
    "networks.EDMPickle": "stillhouse.checkpoints.EDMPickle",
    "networks.RectifiedFlowCheckpoint": "stillhouse.checkpoints.RectifiedFlowCheckpoint",
    "networks.": "stillhouse.networks.",
}


def modernised(value: Any) -> Any:
    """A stored config, or a value in it, in plain containers: with each key and `_target_` by its name of today."""
    if isinstance(value, dict):
        branched = str(value.get("_target_")).startswith("lightning_modules.BDense")
        keys = _KEYS | _BRANCHES if branched else _KEYS
        return {keys.get(key, key): _target(v) if key == "_target_" else modernised(v) for key, v in value.items()}
    return [modernised(part) for part in value] if isinstance(value, list) else value


def _target(name: Any) -> Any:
    old = next((old for old in _MOVED if str(name).startswith(old)), None)
    return name if old is None else _MOVED[old] + name[len(old) :]
