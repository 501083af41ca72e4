"""From a model handle and a request to latents: the one place where weights, memory, blocks and sampling meet."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import host
from .blocks import Run
from .memory.resident import Residency, streamed
from .memory.slab import Loaded
from .sampling.guidance import Guided, combination
from .sampling.sample import Hold, SampleError, StepNoise, draw_noise, sample, start_of
from .sampling.schedule import plan_steps
from .types import Denoiser, LatentFormat, ModelHandle, SampleRequest
from .weights.assemble import assemble

log = logging.getLogger(__name__)


def compute_dtype(handle: ModelHandle, device: torch.device) -> torch.dtype:
    """Return what the large products compute in: the handle's choice, else bfloat16 where it is fast, else float32."""
    if handle.dtype is not None:
        return handle.dtype
    return torch.bfloat16 if host.prefers_bfloat16(device) else torch.float32


@contextmanager
def opened(handle: ModelHandle, device: torch.device, working_bytes: int) -> Iterator[tuple[nn.Module, Run, Residency]]:
    """Give the model on the device with a fresh run, and take it off the device again, also after an error.

    Room is made for its weights and for `working_bytes` beside them; blocks that don't fit stream in as they are
    needed. The assembled weights stay in RAM with the handle, for its next run.
    """
    dtype, family = compute_dtype(handle, device), handle.family
    loaded = handle.weights.get((dtype, handle.identity.config), lambda: _assemble(handle, dtype))
    with streamed(loaded, device, working_bytes) as residency:
        hooks = {family.blocks: [residency]}
        yield loaded.module, Run(dtype=dtype, hooks=hooks, check_interrupt=host.block_gate(device)), residency


def with_preset(handle: ModelHandle, request: SampleRequest, name: str) -> tuple[SampleRequest, str]:
    """Return the request with the settings of a preset in place of its own, and what they are.

    Raises ValueError if it is another model's.
    """
    preset = handle.family.presets.get(name)
    if preset is None:
        fitting = " or ".join([*handle.family.presets, "none"])
        raise ValueError(f"preset is {name}, which is not for {handle.family.name} models: choose {fitting}.")
    settings = {
        "steps": preset.steps, "shift": preset.shift, "guidance": (preset.guidance,), "solver": preset.solver,
        "sigmas": None,
    }  # fmt: skip
    said = f"{name}: {preset.steps} steps of {preset.solver}, shift {preset.shift:g}, guidance {preset.guidance:g}"
    return replace(request, **settings), f"{said}; other steps, shift, guidance, solver and sigmas are not used."


def prepared(handle: ModelHandle, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it will be run, and what was corrected or has no effect, in words.

    Raises ValueError for a request that the model can't run.
    """
    _check_latent(request.latent, handle.family.latent_format)
    return handle.family.prepare(handle.identity, request)


def generate(
    handle: ModelHandle,
    request: SampleRequest,
    progress: host.Progress | None = None,
    tell: Callable[[str], None] = log.info,
) -> Tensor:
    """Return raw latents [B, C, T, h, w] in float32 on the CPU for one request.

    `tell` hears in words where the weights are. A pass through the model that runs out of
    memory is repeated with more blocks streaming.
    Raises ValueError for a request that the model can't run, before the model is loaded; `SampleError` with the last
    good latents if the numbers break down on the way, or memory does not suffice even so.
    """
    family, config = handle.family, handle.identity.config
    latent_format, device = family.latent_format, host.device()
    request, notices = prepared(handle, request)
    for notice in notices:
        log.warning(notice)
    shape = tuple(request.latent.shape)
    plan = plan_steps(request, family.schedule(config, shape))
    clean = latent_format.normalise(request.latent.to(device))
    noise = draw_noise(shape, request.seed, request.noise_device, device)
    x = start_of(plan, clean, noise) if request.add_noise else clean
    conditionings = [request.positive, *([request.negative] if request.negative is not None else [])]
    log.info("%s %s: %d steps of %s", family.name, handle.identity.variant, len(plan.timesteps), request.solver)
    combine = combination(family.guidance_patch(config))
    working_bytes = family.working_bytes(config, shape, conditionings, compute_dtype(handle, device))
    with torch.inference_mode(), opened(handle, device, working_bytes) as (model, run, residency):
        if line := residency.describe():
            tell(line)
        denoise = _persistent(family.denoiser(model, run, conditionings, device), residency, tell)
        step_noise = StepNoise(shape, request.seed, request.noise_device, device)
        told = progress or host.progress(len(plan.timesteps), "sampling", latent_format)
        try:
            x = sample(
                x,
                plan,
                request.solver,
                Guided(denoise=denoise, has_negative=request.negative is not None, combine=combine),
                step_noise,
                lambda done, total, x0, x: told.update(done, total, x0),
                _hold(request, clean),
            )
        except SampleError as error:
            error.latent = latent_format.denormalise(error.latent.cpu())
            raise
        return latent_format.denormalise(x).cpu()


def _persistent(denoise: Denoiser, residency: Residency, tell: Callable[[str], None]) -> Denoiser:
    """Return a denoiser that tries again with fewer blocks on the device as often as memory runs out."""

    def attempt(x: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor] | None:
        try:
            return denoise(x, timestep_B, which)
        except RuntimeError as error:
            if not host.is_out_of_memory(error):
                raise
        return None  # outside of the except clause, where all that the failed pass held is gone

    def persistent(x: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        while (velocities := attempt(x, timestep_B, which)) is None:
            if not residency.give_way():
                raise torch.OutOfMemoryError(f"{x.device} is out of memory")
            tell(f"The device ran out of memory; now {residency.describe()}")
        return velocities

    return persistent


def _hold(request: SampleRequest, clean: Tensor) -> Hold | None:
    if request.mask is None or bool((request.mask == 1).all()):
        return None
    if not request.add_noise:
        raise ValueError(
            "The latent has a mask and add_noise is off: what the mask keeps is not known of a noisy latent. Sample "
            "a masked latent in one run."
        )
    return Hold(mask=request.mask.to(clean), clean=clean)


def _assemble(handle: ModelHandle, dtype: torch.dtype) -> Loaded:
    module = assemble(
        lambda: handle.family.build(handle.identity.config),
        handle.identity.names,
        handle.checkpoint,
        float32=handle.family.float32,
        dtype=dtype,
        ignored=handle.identity.ignored,
    )
    return Loaded(module, module.get_submodule(handle.family.blocks))


def _check_latent(latent: Tensor, latent_format: LatentFormat) -> None:
    if latent.dim() != 5 or latent.shape[1] != latent_format.channels or latent.shape[3] % 2 or latent.shape[4] % 2:
        raise ValueError(
            f"The sampler got a latent of shape {tuple(latent.shape)}; this model takes "
            f"[batch, {latent_format.channels}, frames, height/8, width/8] with even sizes. Connect an empty latent of "
            "this model's own node, or encode a picture or video whose width and height are multiples of 16."
        )
    if not torch.isfinite(latent).all():
        raise ValueError("The latent given to the sampler holds NaN or infinite values: look at the node that made it.")
