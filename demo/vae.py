"""What both miniature VAEs share: start, loss and loop of their training, and the scale of their latents."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.types import LatentFormat
from ..wan.config import VAEConfig
from ..wan.vae import WanVAE
from ..wan.vae_layers import CausalConv3d, Downsample, Past, ResidualBlock, Upsample
from .training import Schedule, resume, save

log = logging.getLogger(__name__)

LOG_VARIANCE_START = -7.0
KL_WEIGHT = 3e-4


def train(
    vae: WanVAE, path: Path, schedule: Schedule, draw: Callable[[int], Tensor], held_out: Callable[[], Tensor]
) -> None:
    """Train on `draw(step)`, pixels [B, 3, T, H, W] in [-1, 1]; resumes from `path` and saves there as it goes.

    The PSNR of the reconstructed `held_out()` is logged on the way.
    """
    vae.channels_last()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(resume(path, vae, [optimizer]), schedule.steps):
        loss = _loss(vae, draw(step), torch.Generator().manual_seed(step))
        schedule.apply(optimizer, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("vae step %d loss %.4f", step + 1, loss.item())
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            save(path, vae, [optimizer], step + 1)
            log.info("vae step %d PSNR of held-out pictures %.2f dB", step + 1, psnr(vae, held_out()))


def _loss(vae: WanVAE, pixels: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = (t.float() for t in vae.encode_chunk(pixels, Past()))
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode_chunk(mean + noise * (log_variance / 2).exp(), Past()).float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: WanVAE, pixels: Tensor) -> float:
    """Return the mean PSNR in dB of reconstructed pixels [B, 3, T, H, W]."""
    decoded = vae.decode_chunk(vae.encode_chunk(pixels, Past())[0], Past()).clamp(-1, 1)
    return (10 * torch.log10(4 / (decoded - pixels).square().mean(dim=(1, 2, 3, 4)))).mean().item()


@torch.no_grad()
def preserve_signal(vae: WanVAE) -> None:
    """Start as a network that passes its input through: without this a VAE of this size barely trains on a CPU."""
    for layer in vae.modules():
        if isinstance(layer, CausalConv3d) and layer.kernel == (3, 3, 3):
            last = torch.empty_like(layer.weight[:, :, -1])
            nn.init.kaiming_uniform_(last, a=5**0.5)
            layer.weight.zero_()[:, :, -1] = last * 1.5
            layer.bias.uniform_(-0.02, 0.02)
        elif isinstance(layer, CausalConv3d):
            layer.weight.zero_()
            rows = torch.arange(layer.weight.shape[0])
            layer.weight[rows, rows % layer.weight.shape[1], -1] = 1.0
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.residual["6"].weight.mul_(0.25)
        elif isinstance(layer, Downsample):
            _pass_through(layer.resample[1], torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]))
        elif isinstance(layer, Upsample):
            _pass_through(layer.resample[1], torch.tensor([[0, 0, 0], [0, 1.0, 0], [0, 0, 0]]))
    vae.conv1.bias[vae.config.z_dim :] = LOG_VARIANCE_START
    vae.conv1.weight[vae.config.z_dim :].mul_(0.01)


def _pass_through(conv: nn.Conv2d, taps: Tensor) -> None:
    noise = 0.1 * conv.weight
    conv.weight.copy_(noise)
    for row in range(conv.out_channels):
        conv.weight[row, row] += taps


@torch.no_grad()
def encode(vae: WanVAE, pixels: Tensor, batch: int = 8) -> Tensor:
    """Return raw latents [B, z, T, h, w] of pixels [B, 3, T, H, W]."""
    return torch.cat([vae.encode_chunk(part, Past())[0] for part in pixels.split(batch)])


@torch.no_grad()
def match_latent_statistics(vae: WanVAE, pixels: Tensor, mean: Tensor, std: Tensor) -> None:
    """Make the latents of `pixels` have this mean and standard deviation per channel, decoding unchanged.

    The layers around the latent are 1x1x1 convolutions, so the change of scale is folded into them exactly.
    """
    latents = encode(vae, pixels)
    own_mean, own_std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    z, gain = vae.config.z_dim, std / own_std
    vae.conv1.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - own_mean) * gain + mean
    vae.conv1.bias[z:] += 2 * gain.log()  # the log-variance follows the scale
    matrix = vae.conv2.weight[:, :, 0, 0, 0]
    vae.conv2.bias += matrix @ (own_mean - mean / gain)
    vae.conv2.weight[:, :, 0, 0, 0] = matrix / gain


@torch.no_grad()
def latent_colours(vae: WanVAE, pixels: Tensor, latent_format: LatentFormat) -> tuple[list[list[float]], list[float]]:
    """Return the map [C][3] and bias from normalised latents to the mean colour of their pixels, by least squares."""
    latents = latent_format.normalise(encode(vae, pixels))
    frames = torch.arange(latents.shape[2]) * latent_format.temporal_factor
    means = F.avg_pool2d(pixels[:, :, frames].transpose(1, 2).flatten(0, 1), latent_format.spatial_factor)
    known = latents.movedim(1, -1).flatten(0, -2)
    known = torch.cat((known, torch.ones(len(known), 1)), dim=1)
    fit = torch.linalg.lstsq(known, means.movedim(1, -1).flatten(0, -2)).solution
    return fit[:-1].tolist(), fit[-1].tolist()


def load_or_train(config: VAEConfig, path: Path, train_and_scale: Callable[[], WanVAE]) -> WanVAE:
    """Return the finished VAE that `path` holds; where it holds none yet, make it and keep it there."""
    if not path.exists():
        torch.save(train_and_scale().state_dict(), path)
    vae = WanVAE(config)
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae.channels_last().requires_grad_(False)
