"""Train the miniature Wan VAE on the corpus: stills first, then clips, and scale its latents to Wan's statistics."""

import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wan.config import VAEConfig
from ..wan.vae import WanVAE
from ..wan.vae_layers import CausalConv3d, Downsample, Past, ResidualBlock, Upsample
from . import corpus
from .training import Schedule, resume, save

log = logging.getLogger(__name__)

CONFIG = VAEConfig(dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
STILLS_BATCH, CLIPS_BATCH = 16, 4
LOG_VARIANCE_START = -7.0
KL_WEIGHT = 3e-4


def train_vae(work: Path, schedule: Schedule, seed: int = 0) -> WanVAE:
    """Return the trained VAE; resumes from `work` and saves there as it goes."""
    torch.manual_seed(seed)
    vae = WanVAE(CONFIG)
    preserve_signal(vae)
    vae.channels_last()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0)
    training, held_out = corpus.scenes()
    start = resume(work / "vae.pt", vae, [optimizer])
    for step in range(start, schedule.steps):
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        is_stills = step < schedule.steps // 4 or step % 5 == 0
        clips = corpus.render(rng.choices(training, k=STILLS_BATCH if is_stills else CLIPS_BATCH), generator)
        pixels = clips[:, :, rng.randrange(corpus.FRAMES)][:, :, None] if is_stills else clips
        loss = _loss(vae, pixels, generator)
        schedule.apply(optimizer, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("vae step %d loss %.4f", step + 1, loss.item())
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            save(work / "vae.pt", vae, [optimizer], step + 1)
            log.info("vae step %d PSNR on held-out clips %.2f dB", step + 1, psnr(vae, held_out[:16]))
    return vae


def _loss(vae: WanVAE, pixels: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = (t.float() for t in vae.encode_chunk(pixels, Past()))
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode_chunk(mean + noise * (log_variance / 2).exp(), Past()).float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: WanVAE, scenes: list[corpus.Scene]) -> float:
    """Return the mean PSNR in dB of reconstructed clips of `scenes`."""
    clips = corpus.render(scenes, torch.Generator().manual_seed(1))
    decoded = vae.decode_chunk(vae.encode_chunk(clips, Past())[0], Past()).clamp(-1, 1)
    return (10 * torch.log10(4 / (decoded - clips).square().mean(dim=(1, 2, 3, 4)))).mean().item()


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
def match_latent_statistics(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Make the latents of the corpus have Wan's per-channel mean and standard deviation, decoding unchanged.

    The layers around the latent are 1x1x1 convolutions, so the change of scale is folded into them exactly.
    """
    training, _ = corpus.scenes()
    clips = corpus.render(random.Random(2).choices(training, k=128), torch.Generator().manual_seed(2))
    latents = torch.cat([vae.encode_chunk(part, Past())[0] for part in clips.split(16)])
    own_mean, own_std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    z, gain = vae.config.z_dim, std / own_std
    vae.conv1.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - own_mean) * gain + mean
    vae.conv1.bias[z:] += 2 * gain.log()  # the log-variance follows the scale
    matrix = vae.conv2.weight[:, :, 0, 0, 0]
    vae.conv2.bias += matrix @ (own_mean - mean / gain)
    vae.conv2.weight[:, :, 0, 0, 0] = matrix / gain
