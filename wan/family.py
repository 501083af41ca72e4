"""Wan 2.1 as core sees it: its latent space, how to build it, how a prompt drives it."""

import math

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.types import Conditioning, Family, LatentFormat, Velocity
from .config import LATENT_CHANNELS, WanConfig
from .transformer import Prompt, WanTransformer

# Per latent channel; source: wan/modules/vae.py of the official repository. Qwen-Image's VAE has the same.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

SIZE_STEP = 16  # a latent position is 8 pixels wide and the transformer takes patches of 2 x 2 positions

# Parameters that published bfloat16 runs keep in float32: 1.3 % of all, and the ones that rounding hurts.
FLOAT32_PARTS = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name or name.endswith("modulation")


def denoisers(
    model: WanTransformer, run: Run, conditionings: list[Conditioning], device: torch.device
) -> list[Velocity]:
    """Return one velocity function per conditioning; equal texts share one prompt, with its keys and values.

    Raises ValueError for text of another encoder.
    """
    prompts: list[Prompt] = []
    for i, conditioning in enumerate(conditionings):
        width = conditioning.text.shape[-1]
        if width != model.config.text_dim:
            raise ValueError(
                f"This Wan model takes text rows of width {model.config.text_dim} (UMT5), the conditioning has {width}:"
                " encode the prompt with the text encoder that belongs to this model."
            )
        twin = next((j for j in range(i) if torch.equal(conditionings[j].text, conditioning.text)), None)
        prompts.append(prompts[twin] if twin is not None else model.prompt(conditioning.text.to(device), run))
    return [_velocity(model, prompt, run) for prompt in prompts]


def _velocity(model: WanTransformer, prompt: Prompt, run: Run) -> Velocity:
    def velocity(x_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        return model(x_BCTHW, timestep_B, prompt, run)

    return velocity


def fit_clip(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the nearest width, height and frames that Wan can make; the larger one from half way between two."""
    size, time = SIZE_STEP, LATENT_FORMAT.temporal_factor
    width, height = (max(size, (side + size // 2) // size * size) for side in (width, height))
    return width, height, max(0, (frames - 1 + time // 2) // time * time) + 1


def working_bytes(config: WanConfig, latent_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Estimate the bytes a forward needs beside the weights: the widest moment of a block, and the keys of two prompts.

    That moment is the feed-forward with its hidden layer twice, or the self-attention with q and k in float32;
    tests/wan/test_transformer.py holds it against measured peaks.
    """
    batch, _, frames, height, width = latent_shape
    tokens = batch * frames * height * width // math.prod(config.patch_size)
    feed_forward = 2 * config.ffn_dim * dtype.itemsize + config.dim * (12 + 2 * dtype.itemsize)
    self_attention = config.dim * (34 + 3 * dtype.itemsize)
    prompts = 2 * (2 * config.num_layers + 2) * config.text_len * config.dim * dtype.itemsize  # and their rows
    return tokens * max(feed_forward, self_attention) + prompts


LATENT_FORMAT = LatentFormat(
    channels=LATENT_CHANNELS,
    spatial_factor=8,
    temporal_factor=4,
    mean=LATENT_MEAN,
    std=LATENT_STD,
    comfy_name="Wan21",
)
FAMILY = Family(
    name="wan21",
    latent_format=LATENT_FORMAT,
    default_shift=5.0,  # generate.py of the official repository; its README advises 8 to 12 for the 1.3B
    build=WanTransformer,
    float32=keep_float32,
    denoisers=denoisers,
    working_bytes=working_bytes,
)
