"""Folders of runs that trained a flow, without the training."""

from omegaconf import OmegaConf

from stillhouse.checkpoints import save_weights
from stillhouse.networks import SongUNet


def write_run(path, *, finished=True, **changes):
    """One of the digits with random weights; changes: of its network, solver, steps, conditional."""
    network = {"resolution": 8, "in_channels": 1, "out_channels": 1, "num_classes": 10, "model_channels": 8}
    network |= {"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
    network |= {key: value for key, value in changes.items() if key in network}
    teacher = {
        "_target_": "stillhouse.diffusion.teacher.Teacher",
        "name": "digits_rf1",
        "network": {"_target_": "stillhouse.networks.SongUNet", **network},
        "preconditioning": {"_target_": "stillhouse.diffusion.preconditioning.Velocity"},
        "schedule": {"_target_": "stillhouse.diffusion.schedules.flow_uniform", "_partial_": True},
        "solver": changes.get("solver", "flow_heun"),
        "steps": changes.get("steps", 10),
        "conditional": changes.get("conditional", True),
    }
    path.mkdir(parents=True)
    OmegaConf.save({"method": {"teacher": teacher}}, path / "config.yaml")
    if finished:
        save_weights(path / "student.safetensors", SongUNet(**network).state_dict(), {})
