"""The U-Net of DDPM (Ho et al. 2020) out of diffusers' blocks, behind the contract of the other networks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.checks import check_counts, check_fractions, check_integers, check_levels, check_multiple
from stillhouse.networks.branching import BranchedConv2d
from stillhouse.networks.layers import zeroed
from stillhouse.networks.network import Network


class DDPMEmbedding(nn.Module):
    """The time index of each sample as a vector (B, emb_channels), in full precision always; both kinds of labels are None.

    Frequencies fall geometrically from 1 towards 1/10000, which the last one reaches with `freq_shift=1`.
    """

    def __init__(self, channels: int, emb_channels: int, flip_sin_to_cos: bool, freq_shift: int):
        super().__init__()
        half = channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - freq_shift)
        self.register_buffer("freqs", exponent.exp(), persistent=False)
        self.flip = flip_sin_to_cos
        self.layer1 = nn.Linear(channels, emb_channels)
        self.layer2 = nn.Linear(emb_channels, emb_channels)
        self.steps: nn.Module | None = None  # see stillhouse/networks/step_condition.py

    def forward(
        self,
        noise_labels: Tensor,
        class_labels: None = None,
        augment_labels: None = None,
        span: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            angles = noise_labels[:, None] * self.freqs
            waves = [angles.cos(), angles.sin()] if self.flip else [angles.sin(), angles.cos()]
            emb = self.layer2(F.silu(self.layer1(torch.cat(waves, dim=1).to(self.layer1.weight.dtype))))
            if self.steps is not None:
                emb = emb + self.steps()
            if span is not None:
                emb = emb + self.second_time(span)  # see stillhouse/networks/second_time.py
            return emb  # its blocks apply the last nonlinearity


class DiffusersUNet(Network):
    """diffusers' UNet2DModel as DDPM's published weights need it, without classes; the defaults are those for CIFAR-10.

    Layers start as PyTorch's do, the output at zero. Attention has one head.

    Args:
        resolution: of the images, divisible by 2^(levels - 1) with levels = len(channel_mult).
        in_channels: of the input.
        out_channels: of the output.
        model_channels: a multiple of 4 and of `norm_groups`.
        channel_mult: channels of each level over `model_channels`.
        num_blocks: residual blocks of a level in the encoder; the decoder has one more.
        attn_resolutions: resolutions of those levels that have attention, beside the middle, which always has.
        dropout: share of hidden features in training.
        norm_groups: of every group norm.
        norm_eps: of every group norm.
        downsample_padding: of the convolutions that halve the resolution; 0 pads right and below alone.
        flip_sin_to_cos: whether cosines come first in the noise level's waves.
        freq_shift: 1 where their last frequency is 1/10000.

    Raises:
        ValueError: where an option is out of range or does not fit the others.
        ImportError: without diffusers.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        downsample_padding: int = 0,
        flip_sin_to_cos: bool = False,
        freq_shift: int = 1,
    ):
        super().__init__(resolution, in_channels, out_channels)
        check_counts(
            model_channels=model_channels,
            num_blocks=num_blocks,
            norm_groups=norm_groups,
        )
        check_counts(0, downsample_padding=downsample_padding, freq_shift=freq_shift)
        check_fractions(dropout=dropout, norm_eps=norm_eps)
        channel_mult = check_integers("channel_mult", channel_mult)
        attn_resolutions = check_integers("attn_resolutions", attn_resolutions)
        check_levels(resolution, channel_mult, attn_resolutions)
        check_multiple(math.lcm(4, norm_groups), model_channels=model_channels)
        sizes = [resolution >> level for level in range(len(channel_mult))]
        attention = ["Attn" if size in attn_resolutions else "" for size in sizes]
        # By the names of diffusers' config.json, with which published weights are compared.
        self.config = {
            "sample_size": resolution,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": flip_sin_to_cos,
            "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
            "block_out_channels": [model_channels * mult for mult in channel_mult],
            "layers_per_block": num_blocks,
            "downsample_padding": downsample_padding,
            "dropout": dropout,
            "attention_head_dim": None,
            "norm_num_groups": norm_groups,
            "norm_eps": norm_eps,
        }
        from diffusers import UNet2DModel  # takes seconds, and few runs need it

        unet = UNet2DModel(**self.config)
        self.embed = DDPMEmbedding(model_channels, 4 * model_channels, flip_sin_to_cos, freq_shift)
        self.conv_in = unet.conv_in
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.up_blocks = unet.up_blocks
        self.conv_norm_out = unet.conv_norm_out
        self.conv_out = zeroed(BranchedConv2d(self.config["block_out_channels"][0], out_channels, 3, padding=1))
        # of what `encode` gives
        self.encoder_resolution, self.encoder_channels = sizes[-1], self.config["block_out_channels"][-1]

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        x = self.conv_in(x)
        skips = (x,)
        for level in self.down_blocks:
            x, features = level(x, emb)
            skips += features
        return skips

    def _decode(self, features: tuple[Tensor, ...], emb: Tensor) -> Tensor:
        x = self.mid_block(features[-1], emb)
        for level in self.up_blocks:
            count = len(level.resnets)
            x, features = level(x, features[-count:], emb), features[:-count]
        return self.conv_out(F.silu(self.conv_norm_out(x)))
