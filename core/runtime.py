"""From a model handle and a request to latents: the one place where weights, memory, blocks and sampling meet."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import host
from .blocks import Run, as_it_is
from .compiling import CompiledBlocks, num_compiled
from .memory.placement import Plan, headroom_of, wanted_bytes
from .memory.report import describe
from .memory.resident import Residency, placed
from .memory.slab import Loaded
from .memory.supply import Source
from .memory.unpack import Unpack
from .ops.attention_choice import Attended, Faster, as_operator, choose_attention
from .ops.choice import EXACT, Ops, choose
from .ops.product_choice import choose_products, stored_in_8_bits
from .pace import Pace, Stopwatch
from .planning import Scene, attended, card_of, job_of, libraries_on, machine_of, plan_for, working
from .report import Costs, described
from .sampling.guidance import Guided, combination
from .sampling.sample import Hold, SampleError, StepNoise, draw_noise, sample, start_of
from .sampling.schedule import plan_steps
from .sampling.solvers import find_solver
from .types import AUTO_ATTENTION, COMPILE_BLOCKS, SDPA_ATTENTION, Denoiser, LatentFormat, ModelHandle, SampleRequest
from .weights.adapters import Adapters
from .weights.assemble import prepare, wants_whole_products

log = logging.getLogger(__name__)

TRIALS_BYTES = 512 << 20  # of a card, that trying kernels and products takes: the largest weight, some times


def compute_dtype(handle: ModelHandle, device: torch.device) -> torch.dtype:
    """Return what the large products compute in: the handle's choice, else bfloat16 where it is fast, else float32."""
    if handle.dtype is not None:
        return handle.dtype
    return torch.bfloat16 if host.prefers_bfloat16(device) else torch.float32


def spelled(handle: ModelHandle, device: torch.device, scene: Scene | None = None) -> tuple[Ops, list[str]]:
    """Return the spellings of operations that the handle's runs take on a device, and what there is to say of them.

    Attention is tried on what the scene asks of it, where a run is known.
    """
    if device.type == "cuda":
        host.make_room(TRIALS_BYTES, device)
    heads, names = handle.family.heads(handle.identity.config), handle.identity.names
    dtype = compute_dtype(handle, device)
    ops, said = EXACT, ["Blocks are compiled, which fuses what lies between their products."]
    if handle.fast.compile != COMPILE_BLOCKS:
        ops, said = choose(handle.fast.kernels, heads, dtype, device)
    stored = stored_in_8_bits({official: handle.checkpoint.tensors[name] for official, name in names.items()})
    is_whole = bool(stored) and wants_whole_products(handle.checkpoint, names)
    products, more = choose_products(handle.fast, stored, is_whole, device)
    attend, of_attention = choose_attention(handle.fast.attention, heads[1], dtype, device, _asked(handle, scene))
    if isinstance(attend, Faster) and handle.fast.compile == COMPILE_BLOCKS:
        attend = replace(attend, operator=as_operator(attend.name, attend.call))
    return replace(ops, products=products, attention=attend), [*said, *more, *of_attention]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model on the device, and what lives as long as it is there."""

    module: nn.Module
    run: Run
    residency: Residency
    adapters: Adapters
    stopwatch: Stopwatch


@contextmanager
def opened(handle: ModelHandle, device: torch.device, scene: Scene, tell: Callable[[str], None]) -> Iterator[Opened]:
    """Give the model on the device with a fresh run, and take it off the device again, also after an error.

    What stays on the device and what streams through it is planned for the scene; `tell` hears the plan in words. What
    was read into RAM for streaming stays there with the handle, for its next run.
    """
    loaded = loaded_of(handle, scene.dtype)
    is_compiled = handle.fast.compile == COMPILE_BLOCKS
    adapters = Adapters(loaded.module, loaded.blocks, scene.loras, scene.dtype, device, folded=is_compiled)
    unpack = Unpack(loaded.blocks, device, scene.dtype)
    told: list[Plan] = []

    def plan(at_least: int) -> Plan:
        card, options = card_of(device), handle.memory
        if told:  # how passes go through the blocks is settled
            options = replace(options, interleave=told[0].interleaved)
        headroom = headroom_of(host.driver_spills())
        job = job_of(loaded, scene, card)
        host.make_room(wanted_bytes(job, options, headroom, libraries_on(device)), device)
        machine = machine_of(device)
        there = adapters.nbytes + unpack.held_bytes  # already, and planned for anew
        machine = replace(machine, vram=machine.vram + there)
        found, _ = plan_for(loaded, scene, card, machine, options, at_least)
        if not told:
            for line in describe(found, len(loaded.blocks)):
                tell(line)
        told.append(found)
        return found

    # The adapters leave first: what they changed are the weights that the residency has bound.
    with placed(loaded, device, plan) as residency, closing(unpack), closing(adapters):
        if told and residency.plan is not told[0]:
            tell(f"The card has not the memory of that plan; now {residency.describe()}")
        stopwatch = Stopwatch(device)
        hooks, gate = (residency, stopwatch, unpack, adapters), host.block_gate(device)
        run = Run(
            dtype=scene.dtype,
            chunk_rows=scene.chunk_rows,
            ops=scene.ops,
            visit=CompiledBlocks(tell) if is_compiled else as_it_is,
            hooks=hooks,
            check_interrupt=gate,
        )
        yield Opened(module=loaded.module, run=run, residency=residency, adapters=adapters, stopwatch=stopwatch)


def loaded_of(handle: ModelHandle, dtype: torch.dtype) -> Loaded:
    """Return the handle's weights as they are kept between runs; nothing is read yet."""

    def load() -> Loaded:
        weights = prepare(
            lambda: handle.family.build(handle.identity.config),
            handle.identity.names,
            handle.checkpoint,
            float32=handle.family.float32,
            dtype=dtype,
            ignored=handle.identity.ignored,
            blocks=handle.family.blocks,
        )
        return Loaded(weights, handle.family.blocks(weights.module))

    return handle.weights.get((dtype, handle.identity.config), load)


def with_preset(handle: ModelHandle, request: SampleRequest, name: str) -> tuple[SampleRequest, str]:
    """Return the request with the settings of a preset in place of its own, and what they are.

    Raises ValueError if it is another model's.
    """
    preset = handle.family.files.presets.get(name)
    if preset is None:
        fitting = " or ".join([*handle.family.files.presets, "none"])
        raise ValueError(f"preset is {name}, which is not for {handle.family.name} models: choose {fitting}.")
    settings = {
        "steps": preset.steps, "shift": preset.shift, "guidance": (preset.guidance,), "solver": preset.solver,
        "sigmas": None,
    }  # fmt: skip
    said = f"{name}: {preset.steps} steps of {preset.solver}, shift {preset.shift:g}, guidance {preset.guidance:g}"
    return replace(request, **settings), f"{said}; other steps, shift, guidance, solver and sigmas are not used."


def prepared(handle: ModelHandle, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request as it will be run, and what was corrected or has no effect, in words.

    Raises ValueError, with the name of the model's file, for a request that the model can't run.
    """
    _check_latent(request.latent, handle.family.latent_format)
    try:
        request, notices = handle.family.prepare(handle.identity, request)
    except ValueError as error:
        raise ValueError(f"{handle.checkpoint.path.name}: {error}") from error
    if request.mask is not None and not request.mask.any():
        notices = [*notices, "The latent's mask is black everywhere: it is kept as it is, and nothing made anew."]
    steps = request.num_steps
    for lora in working(handle.loras):
        if not any(lora.is_active(step, steps) for step in range(steps)):
            share = f"between {lora.start:g} and {lora.end:g} of {steps} steps"
            notices = [*notices, f"LoRA {lora.checkpoint.path.name} never works: there is no step {share}."]
    return request, notices


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """A model that is open for a run: ask `denoise` for velocities, after `at` has said in which step of how many."""

    there: Opened
    denoise: Denoiser
    at: Callable[[int], None]


@contextmanager
def denoising(
    handle: ModelHandle, device: torch.device, scene: Scene, num_steps: int, tell: Callable[[str], None]
) -> Iterator[Denoising]:
    """Open a model for a run of so many steps, of which another loop than ours may be in charge.

    A pass that runs out of memory is repeated with more blocks streaming. Raises what `opened` does.
    """
    with opened(handle, device, scene, tell) as there:
        stepping = _Stepping(there, scene, device, num_steps)
        yield Denoising(there=there, denoise=_persistent(stepping, there, tell), at=stepping.turn_to)


def generate(
    handle: ModelHandle,
    request: SampleRequest,
    progress: host.Progress | None = None,
    tell: Callable[[str], None] = log.info,
    status: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """Return raw latents [B, C, T, h, w] in float32 on the CPU for one request; finished ones without their lead.

    `tell` hears in words what is made and how, where the weights are, what becomes of the plan, and what all took;
    `status` after each step what is done and how long the rest will take, unless `progress` hears of steps instead.
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
    hold = _hold(request, clean)
    dtype = compute_dtype(handle, device)
    scene, costs = scene_of(handle, request, dtype), Costs(device)
    ops, said = spelled(handle, device, scene)
    scene = replace(scene, ops=ops)
    for line in described(handle, request, plan, dtype, ops) + said:
        tell(line)
    with torch.inference_mode(), denoising(handle, device, scene, request.num_steps, tell) as model:
        there = model.there
        model.at(plan.start)
        costs.opened()
        guided = Guided(
            denoise=model.denoise,
            has_negative=len(scene.conditionings) > 1,
            interleaved=there.residency.plan.interleaved,
            combine=combination(family.guidance_patch(config)),
        )
        step_noise = StepNoise(shape, request.seed, request.noise_device, device)
        told = progress or host.progress(len(plan.timesteps), "sampling", latent_format, status)
        first_passes = 1 if plan.guidance[0] == 1 else len(scene.conditionings)
        watch = _Watch(there, scene, first_passes, tell, handle.fast.compile == COMPILE_BLOCKS)

        def on_step(done: int, total: int, x0: Tensor, x: Tensor) -> None:
            told.update(done, total, x0)
            watch.step()
            costs.step()
            model.at(plan.start + done)

        try:
            x = sample(x, plan, request.solver, guided, step_noise, on_step, hold)
        except SampleError as error:
            error.latent = latent_format.denormalise(error.latent.cpu())
            raise
        if plan.sigmas[-1] == 0:  # a sampler that goes on needs the frames before the clip
            x = x[:, :, request.positive.lead :]
        made = latent_format.denormalise(x).cpu()
    for line in costs.lines():
        tell(line)
    return made


def _asked(handle: ModelHandle, scene: Scene | None) -> frozenset[Attended]:
    """Return what a run asks of attention, where that is to be tried."""
    if scene is None or handle.fast.attention in (AUTO_ATTENTION, SDPA_ATTENTION):
        return frozenset()
    return attended(loaded_of(handle, scene.dtype).module, scene)


def scene_of(handle: ModelHandle, request: SampleRequest, dtype: torch.dtype) -> Scene:
    """Return the run as far as memory and time depend on it: a negative prompt counts only where it will be used."""
    conditionings = [request.positive]
    if request.negative is not None and any(strength != 1 for strength in request.guidance):
        conditionings.append(request.negative)
    return Scene(
        family=handle.family,
        config=handle.identity.config,
        latent_shape=tuple(request.latent.shape),
        conditionings=tuple(conditionings),
        dtype=dtype,
        chunk_rows=handle.memory.chunk_rows,
        kept_latents=find_solver(request.solver).kept_latents,
        loras=working(handle.loras),
    )


class _Stepping:
    """The denoiser of a run, made anew when other LoRAs begin to work, as prompts keep what weights made of them."""

    def __init__(self, there: Opened, scene: Scene, device: torch.device, num_steps: int):
        self.there, self.scene, self.device = there, scene, device
        self.step, self.num_steps = 0, num_steps
        self._denoise: Denoiser | None = None

    def turn_to(self, step: int) -> None:
        """Say which step of the whole schedule comes next."""
        self.step = step

    def __call__(self, x: Tensor, timestep_B: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        there, scene = self.there, self.scene
        if there.adapters.turn_to(self.step, self.num_steps):
            self._denoise = None
        if self._denoise is None:
            self._denoise = scene.family.denoiser(there.module, there.run, list(scene.conditionings), self.device)
        return self._denoise(x, timestep_B, which)


class _Watch:
    """Learns from the first step, and makes room when the driver begins to swap."""

    def __init__(self, there: Opened, scene: Scene, first_passes: int, tell: Callable[[str], None], is_compiled: bool):
        self.num_compiled = num_compiled() if is_compiled else None
        self.there, self.scene, self.first_passes, self.tell = there, scene, first_passes, tell
        plan = there.residency.plan
        # How fast a disk is nobody knows beforehand, so that its plans don't tell what is too slow.
        self.pace = Pace(None if Source.DISK in plan.sources.values() else plan.step_seconds)

    def step(self) -> None:
        """End a step."""
        seconds, visit, residency = self.pace.step(), self.there.stopwatch.read(), self.there.residency
        if self.num_compiled is not None:
            new = num_compiled() - self.num_compiled
            self.tell(f"The first step took {seconds:.1f} s, in which {new} functions were compiled.")
            self.num_compiled = visit = None  # in that time a block did more than compute
        if not residency.is_needed:
            return
        if visit is not None:
            visit /= self.first_passes if residency.plan.interleaved else 1
            residency.loaded.visit_seconds[self.scene.key] = visit
            log.info("A block computes for %.1f ms; the first step took %.1f s with loading", visit * 1000, seconds)
        if not host.driver_spills():
            return
        if self.pace.is_swapped(seconds, host.driver_free(residency.device)) and residency.give_way():
            self.pace = Pace(None)
            self.tell(
                f"A step took {seconds:.1f} s: the driver has begun to swap the card's memory to RAM. Now "
                f"{residency.describe()}."
            )


def _persistent(denoise: Denoiser, there: Opened, tell: Callable[[str], None]) -> Denoiser:
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
            there.adapters.leave_blocks()
            if not there.residency.give_way():
                raise torch.OutOfMemoryError(f"{x.device} is out of memory")
            tell(f"The device ran out of memory; now {there.residency.describe()}")
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


def _check_latent(latent: Tensor, latent_format: LatentFormat) -> None:
    if latent.dim() != 5 or latent.shape[1] != latent_format.channels or latent.shape[3] % 2 or latent.shape[4] % 2:
        raise ValueError(
            f"The sampler got a latent of shape {tuple(latent.shape)}; this model takes "
            f"[batch, {latent_format.channels}, frames, height/8, width/8] with even sizes. Connect an empty latent of "
            "this model's own node, or encode a picture or video whose width and height are multiples of 16."
        )
    if not torch.isfinite(latent).all():
        raise ValueError("The latent given to the sampler holds NaN or infinite values: look at the node that made it.")
