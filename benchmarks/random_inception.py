"""A file like torch-fidelity's Inception weights, but random: the real ones are a download of 96 MB."""

from functools import cache
from pathlib import Path
from unittest import mock

import torch


def write_inception(path: Path) -> Path:
    """A state dict in PyTorch's format, as the network of torch-fidelity saves it; signals keep their size through it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_state(), path)
    return path


@cache
def _state() -> dict[str, torch.Tensor]:
    from torch_fidelity import feature_extractor_inceptionv3 as source  # takes seconds

    class Random(source.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            generator = torch.Generator().manual_seed(0)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    std = (2 / parameter[0].numel()) ** 0.5
                    torch.nn.init.normal_(parameter, std=std, generator=generator)

    with mock.patch.object(source, "load_state_dict_from_url"):
        return Random("random", ["2048"]).state_dict()
