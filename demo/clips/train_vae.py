"""Train the miniature Wan VAE on the corpus: stills first, then clips, and scale its latents to Wan's statistics."""

import random
from pathlib import Path

import torch
from torch import Tensor

from ...wan.config import VAEConfig
from ...wan.vae import WanVAE
from .. import vae as shared
from ..training import Schedule
from . import corpus

CONFIG = VAEConfig(dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
STILLS_BATCH, CLIPS_BATCH = 16, 4


def train_vae(work: Path, schedule: Schedule) -> WanVAE:
    """Return the trained VAE; resumes from `work` and saves there as it goes."""
    torch.manual_seed(0)
    vae = WanVAE(CONFIG)
    shared.preserve_signal(vae)
    training, held_out = corpus.scenes()

    def draw(step: int) -> Tensor:
        generator, rng = torch.Generator().manual_seed(step), random.Random(step)
        is_stills = step < schedule.steps // 4 or step % 5 == 0
        clips = corpus.render(rng.choices(training, k=STILLS_BATCH if is_stills else CLIPS_BATCH), generator)
        return clips[:, :, rng.randrange(corpus.FRAMES)][:, :, None] if is_stills else clips

    shared.train(vae, work / "clips_vae.pt", schedule, draw, lambda: clips_of(held_out[:16], seed=1))
    return vae


def clips_of(scenes: list[corpus.Scene], seed: int) -> Tensor:
    """Return clips [B, 3, F, H, W] in [-1, 1] of scenes."""
    return corpus.render(scenes, torch.Generator().manual_seed(seed))


def sample_clips(count: int, seed: int) -> Tensor:
    """Return clips [B, 3, F, H, W] in [-1, 1] of random scenes of the training."""
    return clips_of(random.Random(seed).choices(corpus.scenes()[0], k=count), seed)
