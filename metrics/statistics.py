"""Mean and covariance of features: accumulated batch by batch, merged over processes, kept in EDM's npz format."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from metrics.files import write_file
from metrics.ranks import rank_and_world

_ROWS = 8192  # converted to float64 at once


class RunningGaussian:
    """Sum and outer-product sum of features in float64, from which mean and covariance follow exactly as from all rows.

    Raw sums merge over processes by addition; float64 leaves about 9 digits where a feature's mean is 1000 of its stds.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> "RunningGaussian":
        """Add the rows of `features` (N, D), which lie on the same device; returns itself."""
        for part in features.split(_ROWS):
            rows = part.double()
            self.sum += rows.sum(dim=0)
            self.outer.addmm_(rows.T, rows)
        self.count += len(features)
        return self

    def merged(self) -> "RunningGaussian":
        """The Gaussian of all ranks' rows together, on every rank; every rank must call it. This one stays as it is."""
        if rank_and_world()[1] == 1:
            return self
        packed = torch.cat([self.sum.new_tensor([self.count]), self.sum, self.outer.flatten()])
        dist.all_reduce(packed)
        total = RunningGaussian(len(self.sum), self.sum.device)
        total.count = int(packed[0].item())
        total.sum, total.outer = packed[1 : 1 + len(self.sum)], packed[1 + len(self.sum) :].view_as(self.outer)
        return total

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._check(1)
        return self.sum / self.count

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance, (D, D) float64."""
        self._check(2)
        return (self.outer - self.sum.outer(self.sum) / self.count) / (self.count - 1)

    def _check(self, needed: int) -> None:
        if self.count < needed:
            raise ValueError(f"this statistic needs at least {needed} rows of features, got {self.count}")


def save_statistics(path: str | Path, mu: Tensor, cov: Tensor) -> None:
    """Write mean (D,) and covariance (D, D) as EDM's reference files hold them: an npz with `mu` and `sigma`, float64."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu.double().cpu().numpy(), sigma=cov.double().cpu().numpy())
    write_file(path, buffer.getvalue())


def load_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64 on the CPU, from an npz of ours or of EDM.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {path}; give the path of an npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, cov = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("mu", "sigma"))
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or holds no reference statistics (mu, sigma): {error}; delete it to have it made again, "
            "or fetch it again"
        ) from error
    if mu.ndim != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{path}: mu {tuple(mu.shape)} and sigma {tuple(cov.shape)} are no mean (D,) and covariance (D, D)"
        )
    return mu, cov
