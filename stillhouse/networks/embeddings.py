"""Embeddings of a U-Net's inputs beside the image: the noise level, the class, the augmentation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.networks.layers import linear, zeroed


class PositionalEmbedding(nn.Module):
    """Sines, then cosines, of the noise label (B,) at frequencies in geometric steps from 1 to 1/10000 (DDPM++).

    Args:
        channels: of the result, even.
        endpoint: False for steps that end one before 1/10000 (ADM).
    """

    def __init__(self, channels: int, endpoint: bool = True):
        super().__init__()
        half = channels // 2
        # In float32 throughout: labels reach 999, where a last-bit difference in a frequency shows in the phase, and
        # the published weights were trained on these values.
        exponent = torch.arange(half, dtype=torch.float32) / (half - endpoint)
        self.register_buffer("freqs", (1 / 10000) ** exponent, persistent=False)

    def forward(self, noise_labels: Tensor) -> Tensor:
        return _sin_cos(noise_labels, self.freqs)


class FourierEmbedding(nn.Module):
    """Sines, then cosines, of the noise label (B,) at random frequencies of standard deviation 16 (NCSN++).

    The frequencies are drawn once, never trained, and belong to the weights.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, noise_labels: Tensor) -> Tensor:
        return _sin_cos(noise_labels, 2 * math.pi * self.freqs)


EMBEDDINGS = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}


class NumberEmbedding(nn.Module):
    """Numbers (B,) as vectors (B, emb_channels), which start at zero: sines and cosines, two linear layers.

    Args:
        channels: of the waves.
        emb_channels: of the vectors.
    """

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.waves = PositionalEmbedding(channels)
        self.layer1 = linear(channels, emb_channels)
        self.layer2 = zeroed(linear(emb_channels, emb_channels))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layer2(F.silu(self.layer1(self.waves(numbers).to(self.layer1.weight.dtype))))


class ConditionEmbedding(nn.Module):
    """Base of the embeddings: what those of all networks do with labels, a number of steps and a second time.

    Args:
        num_classes: 0 without labels.
        label_dropout: share of training samples whose label is hidden.
    """

    def __init__(self, num_classes: int, label_dropout: float):
        super().__init__()
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.steps: nn.Module | None = None  # see stillhouse/networks/step_condition.py

    def classes(self, class_labels: Tensor | None, like: Tensor) -> Tensor:
        """Encode labels as `one_hot`, some of them hidden in training."""
        return one_hot(class_labels, self.num_classes, self.label_dropout if self.training else 0, like)

    def conditioned(self, emb: Tensor, span: Tensor | None) -> Tensor:
        """Add the vectors of the number of steps and of the second time, where there are such."""
        if self.steps is not None:
            emb = emb + self.steps()
        if span is not None:
            emb = emb + self.second_time(span)  # see stillhouse/networks/second_time.py
        return emb


class Embedding(ConditionEmbedding):
    """Noise label, class and augmentation of each sample as one vector (B, emb_channels), in full precision always.

    Args:
        kind: of the noise label's waves, a name of `EMBEDDINGS`.
        noise_channels: of these waves.
        emb_channels: of the vector.
        num_classes: 0 without labels.
        augment_dim: of the augmentation's labels, 0 without.
        label_dropout: share of training samples whose label is hidden.
    """

    def __init__(
        self,
        kind: str,
        noise_channels: int,
        emb_channels: int,
        num_classes: int,
        augment_dim: int,
        label_dropout: float,
    ):
        super().__init__(num_classes, label_dropout)
        self.noise = EMBEDDINGS[kind](noise_channels)
        self.label = linear(num_classes, noise_channels) if num_classes else None
        self.augment = linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.layer1 = linear(noise_channels, emb_channels)
        self.layer2 = linear(emb_channels, emb_channels)

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        span: Tensor | None = None,
    ) -> Tensor:
        # Half precision would blur neighbouring noise levels, and there is next to nothing to gain here.
        with torch.autocast(noise_labels.device.type, enabled=False):
            emb = self.noise(noise_labels).to(self.layer1.weight.dtype)
            # Absent labels are zeros rather than a skipped layer: every parameter always has a gradient (DDP needs it).
            if self.label is not None:
                classes = self.classes(class_labels, emb)
                emb = emb + self.label(classes * math.sqrt(self.num_classes))
            if self.augment is not None:
                zeros = emb.new_zeros(len(emb), self.augment.in_features)
                emb = emb + self.augment(zeros if augment_labels is None else augment_labels.to(emb.dtype))
            emb = self.layer2(F.silu(self.layer1(emb)))
            return F.silu(self.conditioned(emb, span))


class DhariwalEmbedding(ConditionEmbedding):
    """ADM's `Embedding`, whose label joins behind the two layers; arguments and result as there."""

    def __init__(
        self, noise_channels: int, emb_channels: int, num_classes: int, augment_dim: int, label_dropout: float
    ):
        super().__init__(num_classes, label_dropout)
        self.noise = PositionalEmbedding(noise_channels, endpoint=False)
        self.augment = zeroed(nn.Linear(augment_dim, noise_channels, bias=False)) if augment_dim else None
        self.layer1 = nn.Linear(noise_channels, emb_channels)
        self.layer2 = nn.Linear(emb_channels, emb_channels)
        self.label = nn.Linear(num_classes, emb_channels, bias=False) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight)

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        span: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            waves = self.noise(noise_labels).to(self.layer1.weight.dtype)
            emb = waves.roll(waves.shape[1] // 2, dims=1)  # cosines first
            if self.augment is not None:
                zeros = emb.new_zeros(len(emb), self.augment.in_features)
                emb = emb + self.augment(zeros if augment_labels is None else augment_labels.to(emb.dtype))
            emb = self.conditioned(self.layer2(F.silu(self.layer1(emb))), span)
            if self.label is not None:
                emb = emb + self.label(self.classes(class_labels, emb))
            return F.silu(emb)


def one_hot(class_labels: Tensor | None, num_classes: int, dropout: float, like: Tensor) -> Tensor:
    """Encode labels as (B, num_classes) with the dtype and device of `like` (B, ...); zeros where they are absent or dropped."""
    if class_labels is None:
        return like.new_zeros(len(like), num_classes)
    classes = F.one_hot(class_labels, num_classes).to(like.dtype)
    if dropout:
        classes = classes * (torch.rand(len(like), 1, device=like.device) >= dropout)
    return classes


def _sin_cos(labels: Tensor, freqs: Tensor) -> Tensor:
    angles = labels[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)
