"""Wan 2.1 as core sees it: its latent space, how to build it, how a prompt drives it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.types import Conditioning, Denoiser, Family, Identity, SampleRequest, Schedule, same
from .conditioning import from_comfy
from .config import SIZE_STEP, WanConfig
from .requests import check_request
from .transformer import Prompt, WanTransformer
from .vae import LATENT_FORMAT

NAME = "wan21"
SMALLER_SIDES = [60, 104]  # latent positions of 480 x 832 pixels, for which image to video has a shift of its own

# Parameters that published bfloat16 runs keep in float32: 1.3 % of all, and the ones that rounding hurts.
FLOAT32_PARTS = (
    "patch_embedding.", "time_embedding.", "time_projection.", "head.", "img_emb.emb_pos", "img_emb.proj.0.",
    "img_emb.proj.4.",
)  # fmt: skip


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name or name.endswith("modulation")


def denoiser(model: WanTransformer, run: Run, conditionings: list[Conditioning], device: torch.device) -> Denoiser:
    """Return the velocities of conditionings as a function; equal ones share one prompt, with its keys and values."""
    prompts: list[Prompt] = []
    for i, conditioning in enumerate(conditionings):
        parts = _parts(conditioning)
        twin = next((j for j in range(i) if all(map(same, _parts(conditionings[j]), parts))), None)
        if twin is not None:
            prompts.append(prompts[twin])
            continue
        text, image, extra = (None if part is None else part.to(device) for part in parts)
        prompts.append(model.prompt(text, run, None, image, extra))

    def denoise(x_BCTHW: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        return model.velocities(x_BCTHW, timestep_B, [prompts[k] for k in which], run)

    return denoise


def _parts(conditioning: Conditioning) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return conditioning.text, conditioning.image, conditioning.extra


def planned(config: WanConfig, latent_shape: tuple[int, ...], conditioning: Conditioning) -> Conditioning:
    """Return a prompt with the image rows and extra channels of zeros that the model takes for latents of a shape."""
    image = torch.zeros(1, config.image_rows, config.image_dim) if config.image_dim else None
    extra = torch.zeros(1, config.extra_dim, *latent_shape[2:]) if config.extra_dim else None
    return replace(conditioning, image=image, extra=extra)


def fit_clip(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the nearest width, height and frames that Wan can make; the larger one from half way between two."""
    size, time = SIZE_STEP, LATENT_FORMAT.temporal_factor
    width, height = (max(size, (side + size // 2) // size * size) for side in (width, height))
    return width, height, max(0, (frames - 1 + time // 2) // time * time) + 1


def schedule(config: WanConfig, latent_shape: tuple[int, ...]) -> Schedule:
    """Return the published schedule (generate.py): shift 5; the README advises 8 to 12 for the 1.3B.

    Models of a first picture take 3 at 480p, models of a first and a last one 16.
    """
    if config.image_positions:
        return Schedule(shift=16.0)
    at_480p = sorted(latent_shape[3:]) == SMALLER_SIDES
    return Schedule(shift=3.0 if config.extra_dim and at_480p else 5.0)


def check(identity: Identity, to_plan: bool = False) -> None:
    """Raise ValueError for a model of the family that can't be run yet, or with `to_plan` not even planned."""
    if identity.variant.startswith("vace"):
        raise ValueError(
            f"this is Wan 2.1 {identity.variant}, which also takes a control video; this version runs text to video, "
            "image to video and first and last frame only. Choose such a file (wan2.1_t2v_1.3B, wan2.1_t2v_14B, "
            "wan2.1_i2v_480p_14B, wan2.1_flf2v_720p_14B)."
        )


def prepare(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it is run, and nothing to say. Raises ValueError for prompts that the model can't take."""
    check(identity)
    check_request(identity, request)
    return request, []


def block_operations(config: WanConfig, latent_shape: tuple[int, ...], conditioning: Conditioning) -> tuple[int, int]:
    """Return the floating point operations of a pass through a block: in matrix products, and in attention.

    The prompt's keys and values are counted, although short clips compute them only once.
    """
    batch, _, frames, height, width = latent_shape
    tokens, rows = frames * height * width // math.prod(config.patch_size), config.text_len + config.image_rows
    products = 2 * tokens * config.dim * (6 * config.dim + 2 * config.ffn_dim) + 4 * rows * config.dim**2
    return batch * products, 4 * batch * tokens * (tokens + rows) * config.dim


FAMILY = Family(
    name=NAME,
    latent_format=LATENT_FORMAT,
    build=WanTransformer,
    blocks="blocks",
    float32=keep_float32,
    schedule=schedule,
    denoiser=denoiser,
    guidance_patch=lambda config: None,
    block_operations=block_operations,
    conditionings=lambda config, rows: from_comfy(rows, config),
    planned=planned,
    check=check,
    prepare=prepare,
)
