"""Folders as diffusers' hub publishes them: a UNet2DModel's weights, its config.json and its scheduler's."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.checkpoints.bounds import parse_json
from stillhouse.checkpoints.inert_pickle import shown
from stillhouse.checkpoints.published import PublishedCheckpoint, check_equal, damaged, load_tensors
from stillhouse.networks.diffusers_unet import DiffusersUNet

# The files of 2022 call the layers of an attention so.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EMBEDDING = {"linear_1": "layer1", "linear_2": "layer2"}
_SAMPLING = {"dropout"}  # of the configuration, but not of the function


class DiffusersFolder(PublishedCheckpoint):
    """The weights file of a UNet2DModel, .safetensors or .bin, in the folder where it was published.

    config.json beside it must say what is configured; so must scheduler_config.json, beside it or in the folder
    `scheduler` next to it, where pipelines keep it: an eps network on the preconditioning's own betas. A weights file alone,
    as a download brings it, is checked by its names and shapes; the card names the files that were there to be checked.
    """

    @property
    def name(self) -> str:
        folder = Path(self.file).parent
        return folder.parent.name if folder.name == "unet" else folder.name

    def read(
        self, file: Path, network: nn.Module, preconditioning: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(network, DiffusersUNet):
            raise ValueError(
                f"{file} holds a UNet2DModel of diffusers, not a {type(network).__name__}: set teacher.network"
            )
        check_equal(file, {"preconditioning": ("Epsilon", type(preconditioning).__name__)})
        checked = []
        config = file.parent / "config.json"
        if config.is_file():
            _check_config(config, network)
            checked.append(config.name)
        beside, sibling = (
            folder / "scheduler_config.json" for folder in (file.parent, file.parent.parent / "scheduler")
        )
        scheduler = beside if beside.is_file() else sibling
        if scheduler.is_file() and (scheduler == beside or file.parent.name == "unet"):
            _check_scheduler(scheduler, preconditioning)
            checked.append(scheduler.name)
        state = {_our_name(name): value for name, value in _load(file).items()}
        return state, {"class": "UNet2DModel", "checked": checked}


def _our_name(name: str) -> str:
    name = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda match: _ATTENTION[match[1]], name)
    return re.sub(r"^time_embedding\.(linear_[12])", lambda match: f"embed.{_EMBEDDING[match[1]]}", name)


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    state = load_tensors(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no tensors by name; take the folder's diffusion_pytorch_model file")
    return state


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no list of options")
        return content
    except ValueError as error:
        raise OSError(f"{file} is damaged ({error}); fetch it again") from error


def _check_config(file: Path, network: DiffusersUNet) -> None:
    from diffusers import UNet2DModel

    defaults = {
        name: option.default
        for name, option in inspect.signature(UNet2DModel.__init__).parameters.items()
        if name != "self"
    }
    published, configured = {**defaults, **_read_json(file)}, {**defaults, **network.config}
    check_equal(file, {"_class_name": (published.get("_class_name", "UNet2DModel"), "UNet2DModel")})
    pairs = {name: (_plain(published[name]), _plain(configured[name])) for name in defaults if name not in _SAMPLING}
    check_equal(file, pairs)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_scheduler(file: Path, preconditioning: nn.Module) -> None:
    config = _read_json(file)
    check_equal(
        file,
        {
            "prediction_type": (config.get("prediction_type", "epsilon"), "epsilon"),
            "beta_schedule": (config.get("beta_schedule", "linear"), "linear"),
            "trained_betas": (config.get("trained_betas"), None),
            "num_train_timesteps": (config.get("num_train_timesteps", 1000), len(preconditioning.log_sigmas)),
        },
    )
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if not all(isinstance(beta, int | float) and 0 < beta < 1 for beta in (start, end)):
        raise ValueError(
            f"{file} has beta_start={shown(start)} and beta_end={shown(end)}, which are no betas; fetch it again"
        )
    log_signal = (1 - torch.linspace(start, end, len(preconditioning.log_sigmas), dtype=torch.float64)).log().cumsum(0)
    log_sigmas = ((1 - log_signal.exp()) / log_signal.exp()).log() / 2
    if not torch.allclose(log_sigmas, preconditioning.log_sigmas.cpu(), atol=1e-6):
        raise ValueError(
            f"{file} has beta_start={start} and beta_end={end}, other noise levels than teacher.preconditioning: set these there"
        )
