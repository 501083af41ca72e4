"""Wan 2.1 as core sees it: its latent space, how to build it, how a prompt drives it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.types import Conditioning, Control, Denoiser, Family, Identity, SampleRequest, Schedule, same
from .conditioning import from_comfy
from .config import SIZE_STEP, WanConfig
from .controls import controlled
from .files import FILES
from .requests import check_request
from .transformer import Prompt, WanTransformer
from .vae import LATENT_FORMAT

# Latent positions of a frame half way between the two areas that I2V was published for, 480 x 832 and 720 x 1280
# pixels. The official code decides by the area asked for, whatever the shape of the picture makes of it.
BETWEEN_AREAS = math.sqrt(60 * 104 * 90 * 160)

# Parameters that published bfloat16 runs keep in float32: 1.3 % of all, and the ones that rounding hurts.
FLOAT32_PARTS = (
    "patch_embedding.", "vace_patch_embedding.", "time_embedding.", "time_projection.", "head.", "img_emb.emb_pos",
    "img_emb.proj.0.", "img_emb.proj.4.",
)  # fmt: skip


def keep_float32(name: str) -> bool:
    """Say whether a parameter stays in float32 whatever the compute dtype."""
    return name.startswith(FLOAT32_PARTS) or "norm" in name or name.endswith("modulation")


def denoiser(model: WanTransformer, run: Run, conditionings: list[Conditioning], device: torch.device) -> Denoiser:
    """Return the velocities of conditionings as a function; equal ones share one prompt, with its keys and values."""
    prompts: list[Prompt] = []
    there: list[tuple[Tensor, Tensor]] = []  # contexts of controls, and as they are on the device

    def lend(control: Control) -> Control:
        context = next((copy for original, copy in there if same(original, control.context)), None)
        if context is None:
            context = control.context.to(device, run.dtype)
            there.append((control.context, context))
        return replace(control, context=context)

    for i, conditioning in enumerate(conditionings):
        twin = next((j for j in range(i) if _are_same(conditionings[j], conditioning)), None)
        if twin is not None:
            prompts.append(prompts[twin])
            continue
        text, image, extra = (None if part is None else part.to(device) for part in _parts(conditioning))
        controls = [lend(control) for control in conditioning.controls if control.strength]
        prompts.append(model.prompt(text, run, None, image, extra, controls))

    def denoise(x_BCTHW: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        return model.velocities(x_BCTHW, timestep_B, [prompts[k] for k in which], run)

    return denoise


def _parts(conditioning: Conditioning) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return conditioning.text, conditioning.image, conditioning.extra


def _are_same(one: Conditioning, other: Conditioning) -> bool:
    controls = list(zip(one.controls, other.controls, strict=False))
    return (
        all(map(same, _parts(one), _parts(other)))
        and len(one.controls) == len(other.controls)
        and all(a.strength == b.strength and same(a.context, b.context) for a, b in controls)
    )


def planned(config: WanConfig, latent_shape: tuple[int, ...], conditioning: Conditioning) -> Conditioning:
    """Return a prompt with whatever else the model takes for latents of a shape, of zeros: picture, or a control."""
    image = torch.zeros(1, config.image_rows, config.image_dim) if config.image_dim else None
    extra = torch.zeros(1, config.extra_dim, *latent_shape[2:]) if config.extra_dim else None
    control = Control(context=torch.zeros(1, config.vace_dim, *latent_shape[2:]))
    return replace(conditioning, image=image, extra=extra, controls=(control,) if config.vace_dim else ())


def shallow(config: WanConfig, depth: int) -> WanConfig:
    """Return a model with so many of the blocks, and the first VACE block of those that have any."""
    return replace(config, num_layers=min(depth, config.num_layers), vace_layers=(0,) if config.vace_layers else ())


def fit_clip(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the nearest width, height and frames that Wan can make; the larger one from half way between two."""
    size, time = SIZE_STEP, LATENT_FORMAT.temporal_factor
    width, height = (max(size, (side + size // 2) // size * size) for side in (width, height))
    return width, height, max(0, (frames - 1 + time // 2) // time * time) + 1


def schedule(config: WanConfig, latent_shape: tuple[int, ...]) -> Schedule:
    """Return the published schedule (generate.py): shift 5; the README advises 8 to 12 for the 1.3B.

    Models of a first picture take 3 at 480p, models of a first and a last one, or of controls, 16.
    """
    if config.image_positions or config.vace_dim:
        return Schedule(shift=16.0)
    is_small = math.prod(latent_shape[3:]) < BETWEEN_AREAS
    return Schedule(shift=3.0 if config.extra_dim and is_small else 5.0)


def prepare(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it is run, with its controls made to fit one another, and what was changed, in words.

    Raises ValueError for prompts that the model does not take, and for pictures or controls that it lacks.
    """
    check_request(identity, request)
    request, notices = controlled(identity, request)
    return request, notices + _apart(request)


def _apart(request: SampleRequest) -> list[str]:
    positive, negative = request.positive, request.negative
    if negative is None or _are_same(positive, replace(negative, text=positive.text)):
        return []
    return [
        "positive and negative come with different pictures, where Wan expects the same ones: connect both outputs of "
        "each node between the prompts and the sampler."
    ]


def block_operations(config: WanConfig, latent_shape: tuple[int, ...], conditioning: Conditioning) -> tuple[int, int]:
    """Return the floating point operations of a pass through a block, on the average: in products, and in attention.

    The prompt's keys and values are counted, although short clips compute them only once. A VACE block is passed once
    for each control.
    """
    batch, _, frames, height, width = latent_shape
    tokens, rows = frames * height * width // math.prod(config.patch_size), config.text_len + config.image_rows
    products = 2 * tokens * config.dim * (6 * config.dim + 2 * config.ffn_dim) + 4 * rows * config.dim**2
    attention = 4 * tokens * (tokens + rows) * config.dim
    num_controls = sum(control.strength != 0 for control in conditioning.controls)
    guided = len(config.vace_layers) * num_controls
    passes, visits = config.num_layers + guided, config.num_layers + len(config.vace_layers)
    hints = 2 * tokens * config.dim**2 * (guided + num_controls)
    return batch * (passes * products + hints) // visits, batch * passes * attention // visits


FAMILY = Family(
    files=FILES,
    latent_format=LATENT_FORMAT,
    build=WanTransformer,
    blocks=WanTransformer.visits,
    heads=lambda config: (config.num_heads, config.dim // config.num_heads),
    shallow=shallow,
    float32=keep_float32,
    schedule=schedule,
    denoiser=denoiser,
    guidance_patch=lambda config: None,
    block_operations=block_operations,
    conditionings=lambda config, rows: from_comfy(rows, config),
    planned=planned,
    prepare=prepare,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
)
