"""Wan 2.1 as core sees it: its latent space, how to build it, how a prompt drives it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.types import Conditioning, Denoiser, Family, Identity, Preset, SampleRequest, Schedule, same
from .conditioning import from_comfy
from .config import PUBLISHED, WanConfig
from .keymap import DIFFUSION_MODEL_SPELLINGS, PARTS
from .transformer import Prompt, WanTransformer
from .vae import LATENT_FORMAT

NAME = "wan21"
SIZE_STEP = 16  # a latent position is 8 pixels wide and the transformer takes patches of 2 x 2 positions

# Distillations into few steps, one forward each. All visit even levels before the shift: 1000, 750, 500, 250.
PRESETS = {
    # LightX2V: configs/distill/wan21, and the straight steps of its step_distill scheduler.
    "lightx2v-4": Preset(steps=4, shift=5.0, guidance=1.0, solver="euler", words=("lightx2v",)),
    # Self-Forcing: configs/self_forcing_dmd.yaml; pipeline/bidirectional_inference.py adds fresh noise in every step.
    "self-forcing-4": Preset(steps=4, shift=5.0, guidance=1.0, solver="lcm", words=("self", "forcing")),
    # CausVid: configs/wan_causal_dmd_warp_4step_cfg2.yaml; its inference adds fresh noise too.
    "causvid-4": Preset(steps=4, shift=8.0, guidance=1.0, solver="lcm", words=("causvid",)),
}

# Parameters that published bfloat16 runs keep in float32: 1.3 % of all, and the ones that rounding hurts.
FLOAT32_PARTS = (
    "patch_embedding.", "time_embedding.", "time_projection.", "head.", "img_emb.emb_pos", "img_emb.proj.0.",
    "img_emb.proj.4.",
)  # fmt: skip


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name or name.endswith("modulation")


def denoiser(model: WanTransformer, run: Run, conditionings: list[Conditioning], device: torch.device) -> Denoiser:
    """Return the velocities of conditionings as a function; equal ones share one prompt, with its keys and values.

    Raises ValueError for text of another encoder, and for pictures that the model does not take or that it lacks.
    """
    prompts: list[Prompt] = []
    for i, conditioning in enumerate(conditionings):
        _check_conditioning(model.config, conditioning)
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


def _check_conditioning(config: WanConfig, conditioning: Conditioning) -> None:
    width = conditioning.text.shape[-1]
    if width != config.text_dim:
        raise ValueError(
            f"This Wan model takes text rows of width {config.text_dim} (UMT5), the conditioning has {width}:"
            " encode the prompt with the text encoder that belongs to this model."
        )
    image = None if conditioning.image is None else tuple(conditioning.image.shape[1:])
    extra = None if conditioning.extra is None else conditioning.extra.shape[1]
    wanted_image = (config.image_rows, config.image_dim) if config.image_dim else None
    wanted_extra = config.extra_dim or None
    if (image, extra) != (wanted_image, wanted_extra):
        raise ValueError(
            f"This Wan model takes {_pictured(wanted_image, wanted_extra)}, the conditioning has "
            f"{_pictured(image, extra)}: give a picture to a model that is made for one, and to no other."
        )


def _pictured(image: tuple[int, ...] | None, extra: int | None) -> str:
    rows = "no image rows" if image is None else f"image rows of shape {image}"
    return f"{rows} and {extra or 'no'} channels beside the latent's"


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
    """Return the published schedule: shift 5 at every size (generate.py); the README advises 8 to 12 for the 1.3B."""
    return Schedule(shift=5.0)


def check(identity: Identity, to_plan: bool = False) -> None:
    """Raise ValueError for a model of the family that can't be run yet, or with `to_plan` not even planned."""
    config = identity.config
    if identity.variant.startswith("vace") or (not to_plan and (config.image_dim or config.extra_dim)):
        raise ValueError(
            f"this is Wan 2.1 {identity.variant}, which also takes an image or a control video; this version runs text "
            "to video only, and can plan what image to video would take. Choose a T2V file (wan2.1_t2v_1.3B or "
            "wan2.1_t2v_14B)."
        )


def prepare(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it is run, and nothing to say.

    Raises ValueError for a model that can only be planned, and for reference pictures.
    """
    check(identity)
    if any(c is not None and c.references for c in (request.positive, request.negative)):
        raise ValueError(
            f"Wan 2.1 {identity.variant} takes no reference pictures, and the conditioning has some: encode the prompt "
            "with Wan Text Encode, or choose a Qwen-Image-Edit model."
        )
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
    presets=PRESETS,
    spellings=DIFFUSION_MODEL_SPELLINGS,
    parts=PARTS,
    variants=PUBLISHED,
)
