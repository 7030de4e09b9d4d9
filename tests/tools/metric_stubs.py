"""Small stand-ins for tests of metrics: an extractor, a packed data set, a sampler."""

import numpy as np
import torch

from stillhouse.diffusion.random_numbers import sample_noise
from stillhouse.metrics.reference import Reference
from stillhouse.metrics.statistics import RunningGaussian

SHAPE = (1, 4, 4)


class Stub:
    """Eight rectified random projections of images (N, 1, 4, 4)."""

    name, metric_suffix, dim, hash = "stub", "_stub", 8, "5" * 64

    def __init__(self):
        self.matrix = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) / 4

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return (images.flatten(1).float() / 64 @ self.matrix.to(images.device)).relu()

    def class_logits(self, features):
        return features[:, :3]

    def to(self, device):
        return self


class Packed:
    """Forty random images as datamodules.components.packed_images.PackedImages serves them."""

    hash = "a" * 64

    def __init__(self, count=40):
        self.labels = np.arange(count) % 3
        noise = sample_noise(torch.arange(count) + 1000, SHAPE)
        self.images = (noise * 50 + 120).clamp(0, 255).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def fetch(self, indices):
        return self.images[torch.from_numpy(indices)], None


def sampler(noise, labels):
    """Depends on noise and label of each row alone."""
    return noise * 0.4 + (labels[:, None, None, None] - 1) * 0.1


def stub_reference(keep_features=True):
    rows = Stub()(Packed(40).images)
    gaussian = RunningGaussian(8).update(rows)
    return Reference(gaussian.mean, gaussian.cov, Packed.hash, rows if keep_features else None)
