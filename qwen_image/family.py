"""Qwen-Image as core sees it: its latent space, how to build it, how prompts and reference pictures drive it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.types import Conditioning, Denoiser, Family, Identity, Schedule
from ..wan.vae import LATENT_FORMAT
from .conditioning import from_comfy, prepare
from .config import PATCH, QwenImageConfig
from .files import FILES, NAME
from .transformer import Pass, QwenImageTransformer

# Parameters that stay in float32: 0.1 % of all, at both ends of the residual stream or in its norms.
FLOAT32_PARTS = ("img_in.", "time_text_embed.", "norm_out.", "proj_out.")

# The published schedule: mu lies on a line through two (tokens, mu). Source: scheduler_config.json.
SHORTEST, LONGEST = (256, 0.5), (8192, 0.9)
TERMINAL = 0.02
LAYERED_TOKENS = 256  # of one picture, at which the layered model's shift is 1


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name


def mu_for_length(tokens: int, shortest: tuple[int, float] = SHORTEST, longest: tuple[int, float] = LONGEST) -> float:
    """Return mu for pictures of so many tokens, on the line through two (tokens, mu), extended beyond both."""
    (tokens_0, mu_0), (tokens_1, mu_1) = shortest, longest
    return mu_0 + (tokens - tokens_0) * (mu_1 - mu_0) / (tokens_1 - tokens_0)


def schedule(config: QwenImageConfig, latent_shape: tuple[int, ...]) -> Schedule:
    """Return the published schedule for latents [B, C, T, h, w]: larger pictures spend more steps on noise.

    Only the target's tokens count, neither references nor text.
    """
    tokens = latent_shape[-2] * latent_shape[-1] // PATCH**2
    if config.layered:
        return Schedule(shift=math.sqrt(tokens / LAYERED_TOKENS), whole_timesteps=False)
    return Schedule(shift=math.exp(mu_for_length(tokens)), terminal=TERMINAL, whole_timesteps=False)


def denoiser(
    model: QwenImageTransformer, run: Run, conditionings: list[Conditioning], device: torch.device
) -> Denoiser:
    """Return the velocities of conditionings as a function; they share the modulation of a step, and equal prompts.

    Raises ValueError for text of another encoder.
    """
    modulations, passes = model.modulations(), []
    for i, conditioning in enumerate(conditionings):
        width = conditioning.text.shape[-1]
        if width != model.config.text_dim:
            raise ValueError(
                f"This Qwen-Image model takes text rows of width {model.config.text_dim} (Qwen2.5-VL-7B), the "
                f"conditioning has {width}: encode the prompt with the text encoder that belongs to this model."
            )
        twin = next((j for j in range(i) if torch.equal(conditionings[j].text, conditioning.text)), None)
        prompt = passes[twin].prompt if twin is not None else model.prompt(conditioning.text.to(device), run)
        references = tuple(LATENT_FORMAT.normalise(latent.to(device)) for latent in conditioning.references)
        passes.append(Pass(prompt=prompt, references=references))

    def denoise(x_BCTHW: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        return model.velocities(x_BCTHW, timestep_B, [passes[k] for k in which], run, modulations)

    return denoise


def block_operations(
    config: QwenImageConfig, latent_shape: tuple[int, ...], conditioning: Conditioning
) -> tuple[int, int]:
    """Return the floating point operations of a pass through a block: in matrix products, and in attention."""
    batch, _, frames, height, width = latent_shape
    tokens = frames * height * width // PATCH**2 + _extra_tokens(conditioning)
    products = 2 * tokens * config.dim * (4 * config.dim + 2 * config.ffn_dim)
    return batch * products, 4 * batch * tokens**2 * config.dim


def _extra_tokens(conditioning: Conditioning) -> int:
    pictures = sum(latent.shape[-2] * latent.shape[-1] // PATCH**2 for latent in conditioning.references)
    return conditioning.text.shape[1] + pictures


def check_is_qwen_image(identity: Identity) -> None:
    """Raise ValueError for a model of another family."""
    if identity.family != NAME:
        raise ValueError(
            f"The model is {identity.family} {identity.variant}, which can't edit pictures: connect Load Qwen-Image "
            "Model (on the command line, give --model one of its files)."
        )


FAMILY = Family(
    files=FILES,
    latent_format=LATENT_FORMAT,
    build=QwenImageTransformer,
    blocks=lambda model: model.transformer_blocks,
    heads=lambda config: (config.num_heads, config.dim // config.num_heads),
    shallow=lambda config, depth: replace(config, num_layers=min(depth, config.num_layers)),
    float32=keep_float32,
    schedule=schedule,
    denoiser=denoiser,
    # The layered model was published with plain guidance.
    guidance_patch=lambda config: None if config.layered else PATCH,
    block_operations=block_operations,
    conditionings=lambda config, rows: from_comfy(rows, config.text_dim),
    planned=lambda config, latent_shape, conditioning: conditioning,
    prepare=prepare,
    # float16 overflows: the residual streams exceed its range, and the reference clips them.
    dtypes=(torch.bfloat16, torch.float32),
)
