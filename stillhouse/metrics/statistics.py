"""Mean and covariance of features: accumulated batch by batch, merged over processes, stored in EDM's npz format."""

import io
import sys
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.checkpoints.bounds import read_arrays
from stillhouse.files import write_file
from stillhouse.ranks import rank_and_world

_ROWS = 8192  # converted to float64 at once


class RunningGaussian:
    """Sums of features and of their outer products in float64, which give mean and covariance as all rows would.

    Sums merge over processes by addition; about 9 digits are left where a feature's mean is 1000 of its standard deviations.
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
        """The Gaussian of all ranks' rows together, a new one on every rank; every rank must call it."""
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


def save_statistics(path: str | Path, mu: Tensor, cov: Tensor, identity: str | None = None) -> None:
    """Write mean and covariance as EDM's reference files have them: an npz with `mu` and `sigma`, float64.

    Args:
        path: of the file.
        mu: (D,).
        cov: (D, D).
        identity: names what they were made of, and is kept beside them with a hash of both.
    """
    buffer = io.BytesIO()
    numbers = mu.double().cpu().numpy(), cov.double().cpu().numpy()
    named = {} if identity is None else {"identity": np.array(identity), "sha256": np.array(_hash(*numbers))}
    np.savez(buffer, mu=numbers[0], sigma=numbers[1], **named)
    write_file(path, buffer.getvalue())


def load_statistics(path: str | Path, identity: str | None = None) -> tuple[Tensor, Tensor]:
    """Read mean and covariance from an npz of ours or of EDM.

    Args:
        path: of the file.
        identity: what the file was made of; one that does not say so (EDM's, and older ones of ours) is accepted.

    Returns:
        Mean (D,) and covariance (D, D), float64 on the CPU.

    Raises:
        FileNotFoundError: without the file.
        ValueError: for one that is damaged or holds something else: other shapes, complex or infinite numbers, a matrix that is
            no covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {path}; give the path of an npz with mu and sigma")
    try:
        mu, cov, stored, digest = read_arrays(path, ("mu", "sigma", "identity", "sha256"))
        if mu is None or cov is None:
            raise ValueError("it has no " + ("mu" if mu is None else "sigma"))
        if identity is not None and stored is not None and str(stored) != identity:
            raise ValueError("it was made of other images or by another extractor")
        if digest is not None and str(digest) != _hash(mu, cov):
            raise ValueError("its numbers have changed: they do not have its SHA-256")
        mu, cov = _real(mu, "mu"), _real(cov, "sigma")
        check_covariance(mu, cov)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or holds no reference statistics (mu, sigma): {error}; delete it to have it made again, "
            "or fetch it again"
        ) from error
    return mu, cov


def _hash(mu: np.ndarray, cov: np.ndarray) -> str:
    return sha256(mu.tobytes() + cov.tobytes()).hexdigest()


def _real(array: np.ndarray, name: str) -> Tensor:
    """float64, on the CPU."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds values of the kind {array.dtype} instead of real numbers")
    return torch.from_numpy(array.astype(np.float64))


def check_covariance(mu: Tensor, cov: Tensor) -> None:
    """Refuse what can't be a mean (D,) and a covariance (D, D); a variance may be negative by a millionth of their sum.

    Raises:
        ValueError: for other shapes, NaN, asymmetry or negative variances.
    """
    if mu.ndim != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(f"mu {tuple(mu.shape)} and sigma {tuple(cov.shape)} are no mean (D,) and covariance (D, D)")
    if not (mu.isfinite().all() and cov.isfinite().all()):
        raise ValueError("values of mu or sigma are not finite")
    rounding = 1e-6 * cov.diagonal().sum().item() + sys.float_info.min
    if rounding <= 0 or (cov - cov.T).abs().max().item() > rounding:
        raise ValueError("sigma is not symmetric, or has negative variances")
    # About 0.2 seconds for 2,048 features; eigenvalues would take 2.
    if torch.linalg.cholesky_ex(cov + rounding * torch.eye(len(mu), dtype=cov.dtype))[1].item():
        raise ValueError("sigma is no covariance, the variance is negative in some direction")
