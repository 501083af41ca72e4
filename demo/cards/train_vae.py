"""Train the miniature Qwen-Image VAE on stills of the corpus, and scale its latents to the published statistics."""

import logging
import random
from pathlib import Path

import torch
from torch import Tensor

from ...wan.config import VAEConfig
from ...wan.vae import WanVAE
from ...wan.vae_layers import CausalConv3d
from .. import vae as shared
from ..training import Schedule, resume, save
from . import corpus

log = logging.getLogger(__name__)

CONFIG = VAEConfig(dim=16, dim_mult=(1, 2, 2, 3), num_res_blocks=1)
CROP, CROPS_BATCH, WHOLE_BATCH = 48, 28, 6  # pixels, pictures
WHOLE_EVERY = 4  # steps, of which one sees whole pictures
LATENT_NOISE = 0.1  # of a channel's spread, which the decoder learns to put up with: about what sampling leaves


def train_vae(work: Path, schedule: Schedule) -> WanVAE:
    """Return the trained VAE; resumes from `work` and saves there as it goes."""
    torch.manual_seed(0)
    vae = WanVAE(CONFIG)
    shared.preserve_signal(vae)
    forget_time(vae)
    shared.train(vae, work / "cards_vae.pt", schedule, _draw, lambda: pictures(24, seed=-1, held_out=True))
    return vae


def pictures(count: int, seed: int, *, held_out: bool = False) -> Tensor:
    """Return pixels [B, 3, 1, H, W] in [-1, 1] of random scenes."""
    return _rendered(_scenes(count, seed, held_out), seed)


def _scenes(count: int, seed: int, held_out: bool = False) -> list[corpus.Scene]:
    rng = random.Random(seed)
    return [corpus.draw_scene(rng, held_out=held_out) for _ in range(count)]


def _rendered(scenes: list[corpus.Scene], seed: int) -> Tensor:
    rng = random.Random(seed)
    return corpus.render(scenes, [corpus.draw_setting(rng) for _ in scenes])[:, :, None]


def _draw(step: int) -> Tensor:
    """Return whole pictures, or crops of them around one of the glyphs."""
    if step % WHOLE_EVERY == 0:
        return pictures(WHOLE_BATCH, step)
    rng, scenes, crops = random.Random(step), _scenes(CROPS_BATCH, step), []
    for scene, picture in zip(scenes, _rendered(scenes, step), strict=True):
        top, left, bottom, right = corpus.word_box(scene)
        y, x = (
            rng.randint(max(0, low + corpus.CELL - CROP), min(high - corpus.CELL, corpus.SIZE - CROP))
            for low, high in ((top, bottom), (left, right))
        )
        crops.append(picture[..., y : y + CROP, x : x + CROP])
    return torch.stack(crops)


@torch.no_grad()
def forget_time(vae: WanVAE) -> None:
    """Zero the convolutions over time, which no still meets."""
    for layer in vae.modules():
        if isinstance(layer, CausalConv3d) and layer.kernel == (3, 1, 1):
            layer.weight.zero_()
            layer.bias.zero_()


def refine_decoder(vae: WanVAE, path: Path, schedule: Schedule, std: Tensor) -> None:
    """Train the decoder alone, and for latents that are not quite right; resumes from `path`.

    The latents stay as they are, so that a transformer may learn on them meanwhile. `std` [z] is their spread.
    """
    decoder = torch.nn.ModuleList([vae.conv2, vae.decoder]).requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(resume(path, vae, [optimizer]), schedule.steps):
        pixels = pictures(WHOLE_BATCH, seed=1_000_000 + step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latent = vae.encode_chunk(pixels, vae.new_past())[0].float()
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(step))
            latent += LATENT_NOISE * std.view(1, -1, 1, 1, 1) * noise
            error = vae.decode_chunk(latent, vae.new_past()).float() - pixels
        loss = error.abs().mean() + 2 * error.square().mean()
        schedule.apply(optimizer, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("decoder step %d loss %.4f", step + 1, loss.item())
        if (step + 1) % 100 == 0 or step + 1 == schedule.steps:
            save(path, vae, [optimizer], step + 1)
