"""What a run will take of memory and time, before it begins: from shapes alone, no weight is read."""
# B batch, C latent channels, T latent frames, h w latent positions, S text tokens, E width

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from . import host
from .blocks import BlockHook, Run
from .memory.kept import idle_bytes
from .memory.link import measured_speed
from .memory.placement import CUBLAS, CUBLAS_HOPPER, Job, Machine, Plan, make_plan
from .memory.slab import Loaded, Traced
from .memory.trace import LiveBytes
from .memory.unpack import Unpack
from .ops.attention_choice import Attended
from .ops.choice import EXACT, Ops
from .ops.linear import Linear
from .ops.packed import Packed
from .types import Conditioning, Family, Lora, MemoryOptions, same
from .weights.adapters import Adapters, device_bytes

META = torch.device("meta")
SHALLOW = 2  # main blocks of a model's traced twin: the last one may do less than the others
# Latents in float32 that sampling holds while the model runs: noise, what it began with and was given, x, a velocity,
# a mask.
STATE_LATENTS = 6
SMALL_THINGS = 8 << 20  # bytes: timesteps, and what PyTorch's allocator for CUDA rounds up: up to 6 MB of a run


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a graphics card does in a second: operations of matrix products and of attention, bytes of the link.

    `libraries` are the bytes of its memory that libraries keep.
    """

    gemm: float
    attention: float
    link: float
    libraries: int = CUBLAS


# By a part of the card's name; sustained rates in bf16, not those of the data sheet.
CARDS = {
    "RTX 3090": Card(gemm=62e12, attention=55e12, link=24.5e9),
    "RTX 4090": Card(gemm=150e12, attention=140e12, link=24.5e9),
    "H100": Card(gemm=700e12, attention=570e12, link=52e9, libraries=CUBLAS_HOPPER),
    "H200": Card(gemm=740e12, attention=600e12, link=52e9, libraries=CUBLAS_HOPPER),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One sampling run as far as memory and time depend on it; the solver remembers `kept_latents` between steps.

    `ops` is how the operations of blocks are spelled. All of `loras` are taken to work in every step.
    """

    family: Family
    config: Any
    latent_shape: tuple[int, ...]
    conditionings: tuple[Conditioning, ...]
    dtype: torch.dtype
    chunk_rows: int = 0
    kept_latents: int = 0
    loras: tuple[Lora, ...] = ()
    ops: Ops = EXACT

    @property
    def operations(self) -> list[tuple[int, int]]:
        """Floating point operations of each pass through one block: in matrix products, and in attention."""
        return [self.family.block_operations(self.config, self.latent_shape, c) for c in self.conditionings]

    @property
    def key(self) -> object:
        """What tells this scene from others of the same model."""
        prompts = self.conditionings
        shapes = [tuple(None if t is None else t.shape for t in (*_parts(c), *c.references)) for c in prompts]
        twins = [tuple(starmap(same, zip(_parts(prompts[0]), _parts(c), strict=False))) for c in prompts]
        active = [tuple(control.strength != 0 for control in c.controls) for c in prompts]
        loras = tuple((lora.checkpoint.path, lora.checkpoint.identity) for lora in self.loras)
        how = self.dtype, self.chunk_rows, self.ops
        return self.latent_shape, tuple(shapes), tuple(twins), tuple(active), how, loras


def _parts(conditioning: Conditioning) -> list[Tensor | None]:
    """Return the tensors of a prompt that guidance passes may share."""
    contexts = (control.context for control in conditioning.controls)
    return [conditioning.text, conditioning.image, conditioning.extra, *contexts]


def working(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """Return the LoRAs that do anything: those of strength 0 are as if they were not there."""
    return tuple(lora for lora in loras if lora.strength != 0)


def plan_for(
    loaded: Loaded, scene: Scene, card: Card | None, machine: Machine, options: MemoryOptions, at_least: int = 0
) -> tuple[Plan, Job]:
    """Return the plan of a run, and what it plans for; times come from an earlier run of the scene, else of the card.

    `at_least` so many blocks stream. Raises ValueError if the least of the model does not fit, or for options that it
    can't follow.
    """
    job = job_of(loaded, scene, card)
    # What earlier runs keep in RAM is there for this one, of this model or of others that don't run now.
    machine = replace(machine, ram=machine.ram + loaded.kept_bytes + idle_bytes(loaded))
    plan = make_plan(job, machine, options, at_least)
    if plan.streaming and job.passes > 1 and options.interleave is not False:
        job = replace(job, working_interleaved=working_bytes(loaded, scene, interleaved=True))
        plan = make_plan(job, machine, options, at_least)
    return plan, job


def job_of(loaded: Loaded, scene: Scene, card: Card | None) -> Job:
    """Return what a run with one guidance pass after the other asks of the device."""
    *blocks, others = (layout.nbytes for layout in loaded.layouts())
    return Job(
        blocks=tuple(blocks),
        others=others + sum(device_bytes(lora, scene.dtype) for lora in scene.loras),
        working=working_bytes(loaded, scene, interleaved=False),
        passes=len(scene.conditionings),
        in_ram=frozenset(loaded.masters),
        visit_seconds=loaded.visit_seconds.get(scene.key) or (None if card is None else visit_seconds(scene, card)),
    )


def visit_seconds(scene: Scene, card: Card) -> float:
    """Return how long one pass through one block computes on a card, on the average over the passes."""
    costs = scene.operations
    return sum(products / card.gemm + attention / card.attention for products, attention in costs) / len(costs)


def card_named(name: str) -> Card | None:
    """Return what is known of a card, by its name or a part of it; None if nothing is."""
    wanted = name.lower().replace(" ", "")
    known = {label.lower().replace(" ", ""): card for label, card in CARDS.items()}
    if "laptop" in wanted:  # of the same name, and half as fast
        return None
    return next((card for label, card in known.items() if label in wanted or (wanted and wanted in label)), None)


def card_of(device: torch.device) -> Card | None:
    """Return what is known of the card that a device is, None for others."""
    return card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def machine_of(device: torch.device) -> Machine:
    """Return what there is: free memory now, and how fast the link is, as measured once."""
    is_cuda = device.type == "cuda"
    speed = measured_speed(device) if is_cuda else None
    found = Machine(
        vram=host.free_memory(device),
        ram=host.available_ram(),
        total_ram=host.total_ram(),
        is_windows=host.driver_spills(),
        needs_pinning=is_cuda,
        libraries=libraries_on(device),
    )
    return found if speed is None else replace(found, link=speed)


def libraries_on(device: torch.device) -> int:
    """Return the bytes of a device's memory that libraries keep."""
    if device.type != "cuda":
        return 0
    return CUBLAS if torch.cuda.get_device_capability(device) < (9, 0) else CUBLAS_HOPPER


def working_bytes(loaded: Loaded, scene: Scene, *, interleaved: bool) -> int:
    """Return the most bytes that a guided step takes beside the weights, what sampling itself holds included.

    Found by taking the longest pass through a few blocks on the meta device, where nothing is computed: the very code
    that runs on every device. What a block leaves behind for the run, such as the prompts' keys, every block leaves.
    Passes that are interleaved wait for each other before each block.
    """
    if scene.key not in loaded.working:
        loaded.working[scene.key] = _traced(loaded.module, scene)
    traced = loaded.working[scene.key]
    left_behind = (len(loaded.blocks) - traced.visits) * traced.left_behind
    state = (STATE_LATENTS + scene.kept_latents) * torch.Size(scene.latent_shape).numel() * torch.float32.itemsize
    return traced.peak + left_behind + state + SMALL_THINGS + interleaved * traced.waiting


class _Walk:
    """A `BlockHook` that notes what is held before each block, and after the first one."""

    def __init__(self, counted: LiveBytes):
        self.counted, self.after_first = counted, 0
        self.held: list[int] = []

    def before(self, i: int) -> None:
        self.held.append(self.counted.live)

    def after(self, i: int) -> None:
        if i == 0:
            self.after_first = self.counted.live


def _traced(module: nn.Module, scene: Scene) -> Traced:
    """Return what the longest pass takes of a model of a few blocks, and what the others hold meanwhile."""
    family, twin = scene.family, _shallow_twin(module, scene)
    every = tuple(range(len(scene.conditionings)))
    longest = max(every, key=lambda k: sum(scene.operations[k]))
    x = torch.empty(scene.latent_shape, device=META)
    timestep_B = torch.full((scene.latent_shape[0],), 500.0)
    loras = [replace(lora, start=0.0, end=1.0) for lora in scene.loras]
    adapters = Adapters(twin, family.blocks(twin), loras, scene.dtype, META)
    adapters.turn_to(0, 1)
    unpack = Unpack(family.blocks(twin), META, scene.dtype)
    # Inference mode, under which samplers run, would hide the tensors of composite operations.
    with torch.inference_mode(False), torch.no_grad(), LiveBytes(META) as counted:
        # The first walk makes what stays for the run; the others tell what comes and goes.
        first, together, alone = (_Walk(counted) for _ in range(3))
        hooks: list[BlockHook] = []
        run = Run(dtype=scene.dtype, chunk_rows=scene.chunk_rows, ops=scene.ops, hooks=hooks)
        denoise = family.denoiser(twin, run, list(scene.conditionings), META)
        for walk, which in ((first, every), (together, every), (alone, (longest,))):
            hooks[:] = [unpack, walk, adapters]
            counted.peak = counted.live
            denoise(x, timestep_B, which)
        waiting = max(both - one for both, one in zip(together.held, alone.held, strict=True))
        return Traced(
            peak=counted.peak,
            left_behind=max(0, first.after_first - first.held[0]),
            waiting=max(0, waiting),
            visits=len(alone.held),
        )


def attended(module: nn.Module, scene: Scene) -> frozenset[Attended]:
    """Return what a model's blocks ask of attention in a step of a run, from shapes alone."""
    noted: set[Attended] = set()

    def note(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
        noted.add(Attended(queries=q_BLND.shape[1], keys=k_BSND.shape[1], is_biased=key_bias_BS is not None))
        return torch.empty_like(q_BLND)

    prompts = list(scene.conditionings)
    twin = _shallow_twin(module, scene)
    hooks = [Unpack(scene.family.blocks(twin), META, scene.dtype)]
    run = Run(dtype=scene.dtype, chunk_rows=scene.chunk_rows, ops=replace(EXACT, attention=note), hooks=hooks)
    with torch.inference_mode(False), torch.no_grad():
        denoise = scene.family.denoiser(twin, run, prompts, META)
        timestep_B = torch.full((scene.latent_shape[0],), 500.0)
        denoise(torch.empty(scene.latent_shape, device=META), timestep_B, tuple(range(len(prompts))))
    return frozenset(noted)


def _shallow_twin(module: nn.Module, scene: Scene) -> nn.Module:
    """Return a model of a few blocks on the meta device, whose tensors are stored as the module's are."""
    with META:
        twin = scene.family.build(scene.family.shallow(scene.config, SHALLOW)).requires_grad_(False)
    stored = dict((*module.named_parameters(), *module.named_buffers()))
    there = dict(twin.named_modules())
    for path, part in module.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(part, Packed) and parent in there:
            twin.get_submodule(parent).add_module(name, Packed(twin, part.layers, part.planes))
    for path, part in twin.named_modules():
        if isinstance(part, Linear):
            part.stored = module.get_submodule(path).stored
        prefix = f"{path}." if path else ""
        for key in part._parameters:
            if part._parameters[key] is not None:
                bare = torch.empty_like(stored[prefix + key], device=META)
                part.register_parameter(key, nn.Parameter(bare, requires_grad=False))
        for key in part._buffers:
            if (held := stored.get(prefix + key)) is not None:
                part._buffers[key] = torch.empty_like(held, device=META)
    return twin


def conditionings_of(
    family: Family,
    config: Any,
    latent_shape: tuple[int, ...],
    rows: Sequence[int],
    references: Sequence[tuple[int, ...]] = (),
) -> tuple[Conditioning, ...]:
    """Return prompts of so many text rows each, no two of them equal, for planning only.

    All have references of these latent shapes, and what else a model takes for latents [B, C, T, h, w].
    """
    pictures = tuple(torch.zeros(shape) for shape in references)
    texts = [torch.full((1, n, config.text_dim), float(k)) for k, n in enumerate(rows)]
    return tuple(family.planned(config, latent_shape, Conditioning(text=t, references=pictures)) for t in texts)
