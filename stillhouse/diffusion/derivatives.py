"""Derivatives of a network's outputs along a path, by forward mode or by central differences, without gradients of weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.flow import per_sample
from stillhouse.diffusion.random_numbers import SharedMasks
from stillhouse.networks.compiling import eager
from stillhouse.networks.embeddings import FourierEmbedding

DERIVATIVES = {"forward": 1, "finite": 2}  # evaluations of the network; one in forward mode takes about as long as two


@torch.no_grad()
def derivative(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    kind: str,
    *,
    network: nn.Module,
    masks: SharedMasks,
    step: float = 1e-3,
    room: Tensor | None = None,
) -> Tensor:
    """Compute the derivative of function(*(inputs + s tangents)) with respect to s, at s = 0.

    The network is evaluated in float32 whatever autocast and TF32 say, as differences and published recipes need it, and with
    the dropout masks of `masks`. Call it on a network itself and not through DDP, and take the loss from an ordinary pass: then
    gradients are averaged over processes as always.

    Args:
        function: of tensors like `inputs`, which evaluates `network`.
        inputs: tensors; float64, so that differences have digits.
        tangents: what each input changes by per unit of s, of the same shapes and dtypes.
        kind: "forward": forward-mode differentiation, which is exact, uncompiled and with attention by plain matrix products;
            "finite": central differences, of any network, compiled or not.
        network: what `function` evaluates.
        masks: the dropout masks.
        step: of the central differences, the size of s.
        room: how far below zero s may go for each sample (B,), where that is less than `step`; None: as far.

    Returns:
        Of the shape of the function's result.
    """
    with torch.autocast(inputs[0].device.type, enabled=False), _exact_products():
        if kind == "forward":
            # Not torch.func.jvp, whose wrapped tensors forget their memory format: channels-last they would get other masks.
            with eager(network), sdpa_kernel(SDPBackend.MATH), masks, forward_ad.dual_level():
                duals = [forward_ad.make_dual(value, tangent) for value, tangent in zip(inputs, tangents, strict=True)]
                result, change = forward_ad.unpack_dual(function(*duals))
            return torch.zeros_like(result) if change is None else change
        ahead = inputs[0].new_full((len(inputs[0]),), step)
        behind = -ahead if room is None else -room.to(ahead).clamp_max(step)
        with masks:
            after = function(*_moved(inputs, tangents, ahead))
        with masks:
            before = function(*_moved(inputs, tangents, behind))
        return (after - before) / per_sample(ahead - behind, after)


def turns_fast(denoiser: Denoiser) -> bool:
    """Tell whether a network's embedding of the noise level turns by tens of radians or more on the way from noise to an image.

    Its exact derivative along the path is then mostly that of ripples in the noise level, which are no part of what the network
    has learned and grow in a training on that derivative; differences over more than a ripple do not see them.
    """
    embedding = getattr(getattr(denoiser.network, "embed", None), "noise", None)
    labels = denoiser.preconditioning(torch.tensor([0.01, 10.0], dtype=torch.float64)).noise
    # Positional waves turn by at most the label, random ones of NCSN++ by a hundred times as much.
    return isinstance(embedding, FourierEmbedding) or (labels[0] - labels[1]).abs().item() > 30


def _moved(inputs: Sequence[Tensor], tangents: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """inputs + s tangents, for s (B,)."""
    return [value + per_sample(s, value) * tangent for value, tangent in zip(inputs, tangents, strict=True)]


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute without TF32 within the block, whose 10 bits a small difference would not survive."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, value in zip(backends, allowed, strict=True):
            backend.allow_tf32 = value
