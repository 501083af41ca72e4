"""The Wan 2.1 video VAE (the image VAE of Qwen-Image as well), streamed over time. Official parameter names."""
# B batch, F pixel frames (4n + 1), T latent frames, H W pixels, h w latent positions (H/8, W/8)

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.types import LatentFormat
from .config import LATENT_CHANNELS, VAEConfig
from .vae_layers import AttentionBlock, CausalConv3d, ChannelNorm, Downsample, Past, ResidualBlock, Upsample, norm_silu

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Tensors of base width at full resolution alive at the peak of a chunk, measured 13.9, and of a still, which keeps
# nothing for later frames, measured 5.6 (tests/wan/test_vae.py).
WORKING_TENSORS = 15.0
STILL_TENSORS = 6.0

# Per latent channel; source: wan/modules/vae.py of the official repository. Qwen-Image's VAE has the same.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENT_FORMAT = LatentFormat(
    channels=LATENT_CHANNELS,
    spatial_factor=8,
    temporal_factor=4,
    mean=LATENT_MEAN,
    std=LATENT_STD,
    comfy_name="Wan21",
)


class Encoder(nn.Module):
    """Pixels to latent statistics, 8 times smaller in space and 4 times in time."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(config.channels, widths[0], 3)
        layers: list[nn.Module] = []
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(narrow if n == 0 else wide, wide) for n in range(config.num_res_blocks)]
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(wide, config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return _run_stack(self, self.downsamples, x, past, middle_first=False)


class Decoder(nn.Module):
    """Latents to pixels; time is doubled at the two lowest resolutions."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for level, (last, width) in enumerate(pairwise(widths)):
            incoming = last // 2 if level > 0 else last  # the upsampler of the level before halved it
            layers += [ResidualBlock(incoming if n == 0 else width, width) for n in range(config.num_res_blocks + 1)]
            if level < len(config.dim_mult) - 1:
                layers.append(Upsample(width, temporal[level]))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], config.channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return _run_stack(self, self.upsamples, x, past, middle_first=True)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)])


def _head(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(width, 4), "2": CausalConv3d(width, out, 3)})


def _run_stack(part: nn.Module, levels: nn.ModuleList, x: Tensor, past: Past, middle_first: bool) -> Tensor:
    x = part.conv1(x, past)
    for layer in [*part.middle, *levels] if middle_first else [*levels, *part.middle]:
        x = layer(x, past)
    return part.head["2"](norm_silu(part.head["0"], x), past)


class WanVAE(nn.Module):
    """The network alone: raw latents (mu, not normalised) in and out, whole clips or chunks of them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def channels_last(self) -> "WanVAE":
        """Store every convolution channels last, the order that CPUs and tensor cores want; no number changes."""
        for parameter in self.parameters():
            if parameter.dim() in CHANNELS_LAST:
                parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.dim()])
        return self

    @property
    def channels(self) -> int:
        """Numbers in a pixel: 3, or 4 with alpha."""
        return self.config.channels

    def new_past(self, *, whole: bool = False) -> Past:
        """Return the memory of a clip that starts now; `whole` says that its first chunk is all of it."""
        return Past(whole=whole)

    def encode_chunk(self, pixels: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B, z, T, h, w] of the next frames: 1 + 4n at first, 4n after, in [-1, 1]."""
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        return self.conv1(self.encoder(pixels, past), past).chunk(2, dim=1)

    def decode_chunk(self, latent: Tensor, past: Past) -> Tensor:
        """Return the pixels of the next latent frames: 1 + 4(n - 1) at first, 4n after; not clamped."""
        latent = latent.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(self.conv2(latent, past), past)

    def working_bytes(self, height: int, width: int, frames: int) -> int:
        """Estimate the bytes that a chunk of `frames` pixel frames needs besides the weights, from its widest layer.

        One frame stands for a whole clip, a still.
        """
        itemsize = self.conv2.weight.element_size()
        tensors = STILL_TENSORS if frames == 1 else WORKING_TENSORS
        return int(tensors * frames * height * width * self.config.dim * itemsize)
