"""Wan 2.1 as core sees it: its latent space, how to build it, how a prompt drives it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.ops.rows import chunk_size
from ..core.types import Conditioning, Denoiser, Family, Identity, SampleRequest, Schedule
from .conditioning import from_comfy
from .config import WanConfig
from .transformer import Prompt, WanTransformer
from .vae import LATENT_FORMAT

NAME = "wan21"
SIZE_STEP = 16  # a latent position is 8 pixels wide and the transformer takes patches of 2 x 2 positions

RUNNABLE = ("t2v-1.3B", "t2v-14B", "custom")

# Parameters that published bfloat16 runs keep in float32: 1.3 % of all, and the ones that rounding hurts.
FLOAT32_PARTS = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name or name.endswith("modulation")


def denoiser(model: WanTransformer, run: Run, conditionings: list[Conditioning], device: torch.device) -> Denoiser:
    """Return the velocities of conditionings as a function; equal texts share one prompt, with its keys and values.

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

    def denoise(x_BCTHW: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        return model.velocities(x_BCTHW, timestep_B, [prompts[k] for k in which], run)

    return denoise


def fit_clip(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the nearest width, height and frames that Wan can make; the larger one from half way between two."""
    size, time = SIZE_STEP, LATENT_FORMAT.temporal_factor
    width, height = (max(size, (side + size // 2) // size * size) for side in (width, height))
    return width, height, max(0, (frames - 1 + time // 2) // time * time) + 1


def schedule(config: WanConfig, latent_shape: tuple[int, ...]) -> Schedule:
    """Return the published schedule: shift 5 at every size (generate.py); the README advises 8 to 12 for the 1.3B."""
    return Schedule(shift=5.0)


def check(identity: Identity) -> None:
    """Raise ValueError for a model of the family that can't be run yet."""
    if identity.variant not in RUNNABLE or identity.config.in_dim != identity.config.out_dim:
        raise ValueError(
            f"this is Wan 2.1 {identity.variant}, which also takes an image or a control video; this version runs text "
            "to video only. Choose a T2V file (wan2.1_t2v_1.3B or wan2.1_t2v_14B)."
        )


def prepare(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it is run, and nothing to say. Raises ValueError for reference pictures."""
    if any(c is not None and c.references for c in (request.positive, request.negative)):
        raise ValueError(
            f"Wan 2.1 {identity.variant} takes no reference pictures, and the conditioning has some: encode the prompt "
            "with Wan Text Encode, or choose a Qwen-Image-Edit model."
        )
    return request, []


def working_bytes(
    config: WanConfig, latent_shape: tuple[int, ...], conditionings: Sequence[Conditioning], dtype: torch.dtype
) -> int:
    """Estimate the bytes a forward needs beside the weights: the widest moment of a block, and the keys of the prompts.

    That moment is the self-attention with its result or a chunk of q on its way beside q, k and v, or the feed-forward
    of a chunk; tests/wan/test_transformer.py holds it against measured peaks.
    """
    batch, _, frames, height, width = latent_shape
    tokens = batch * frames * height * width // math.prod(config.patch_size)
    size = dtype.itemsize
    chunk = batch * chunk_size(tokens // batch)
    feed_forward = tokens * config.dim * (4 + size) + chunk * (config.ffn_dim * size + config.dim * (8 + 2 * size))
    attention = tokens * config.dim * (4 + 3 * size) + max(tokens * size, chunk * (12 + 2 * size)) * config.dim
    text_row = config.dim * dtype.itemsize
    prompts = len(conditionings) * config.text_len * text_row * 2 * (config.num_layers + 1)  # keys, values and rows
    return max(feed_forward, attention) + prompts


FAMILY = Family(
    name=NAME,
    latent_format=LATENT_FORMAT,
    build=WanTransformer,
    blocks="blocks",
    float32=keep_float32,
    schedule=schedule,
    denoiser=denoiser,
    guidance_patch=lambda config: None,
    working_bytes=working_bytes,
    conditionings=lambda config, rows: from_comfy(rows, config.text_dim),
    check=check,
    prepare=prepare,
)
