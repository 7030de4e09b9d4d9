"""The weights of LPIPS: torchvision's VGG-16, whose file is never downloaded here, and the heads that come with torchmetrics."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.checkpoints.bounds import check_archive
from stillhouse.checkpoints.weights import did_you_mean, find_weights
from stillhouse.networks.lpips import LPIPS, STAGES, check_lpips_resize, vgg16

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, 528 MB


def load_lpips(weights: str | Path | None = None, resize: int | None = None) -> LPIPS:
    """Load LPIPS, version 0.1, on VGG-16: its values are torchmetrics'.

    Args:
        weights: VGG-16's file; None: where torchvision would keep it, in torch hub's folder.
        resize: as of `LPIPS`.

    Raises:
        FileNotFoundError: for missing weights.
        OSError: for damaged ones.
        ValueError: for those of another network, or an impossible `resize`.
    """
    check_lpips_resize(resize)  # before files are looked for
    return LPIPS(_read_vgg16(weights), _read_heads(), resize)


def vgg16_file(weights: str | Path | None) -> Path:
    """The path of VGG-16's weights: `weights`, or where torchvision keeps them in torch hub's folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name if weights is None else Path(weights)


def _read_vgg16(weights: str | Path | None) -> nn.Sequential:
    path = vgg16_file(weights)
    try:
        path = find_weights(path)
    except FileNotFoundError as error:
        near = did_you_mean(weights) if weights else ""
        raise FileNotFoundError(
            f"no VGG-16 weights at {path}{near}; add download=true to fetch {URL}, or say where that file is by "
            "method.lpips_weights"
        ) from error
    try:
        # The published file is older than the zip format of torch.save, and only that can be mapped.
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many kinds
        raise OSError(f"{path} is damaged or no file of weights; delete it and fetch it again") from error
    with torch.device("meta"):  # leaves the random state alone
        features = vgg16()
    given = {}
    if isinstance(state, Mapping):  # with the classifier, which is ignored
        given = {str(name)[9:]: value for name, value in state.items() if str(name).startswith("features.")}
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    if shapes != {name: value.shape for name, value in features.state_dict().items()}:
        raise ValueError(f"{path} holds weights of another network; fetch {URL}")
    features.to_empty(device="cpu").load_state_dict(given)
    return features


def _read_heads() -> list[Tensor]:
    import torchmetrics  # takes a second

    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{level}.model.1.weight"] for level in range(len(STAGES))]  # (1, channels, 1, 1)
