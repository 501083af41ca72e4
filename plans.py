"""The plan of a run, on this machine or another, for people and for programs: from the model's header alone."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .core import host
from .core.memory.placement import GB, Machine
from .core.memory.report import describe
from .core.memory.resident import computes_in_ram
from .core.past import MODES
from .core.planning import CARDS, Card, Scene, card_named, card_of, conditionings_of, machine_of, plan_for, working
from .core.runtime import compute_dtype, loaded_of, spelled
from .core.sampling.solvers import SOLVERS
from .core.text import Footprint, plan_of
from .core.types import ModelHandle
from .qwen_image import text_encoder as qwen_vl
from .qwen_image.files import NAME as QWEN_IMAGE
from .qwen_image.vl_config import VLConfig
from .wan import image_encoder as clip
from .wan import text_encoder as umt5
from .wan.config import ImageEncoderConfig, TextEncoderConfig, VAEConfig
from .wan.files import NAME as WAN
from .wan.vae import decode_bytes, weight_bytes

GIB = 1 << 30
SYSTEM_VRAM = 600_000_000  # bytes of a card that its driver and a CUDA context take before anything else
SYSTEM_RAM = 4_000_000_000  # bytes that a desktop, a browser and ComfyUI itself take
DEFAULT_CARD = "RTX 4090"
TEXT_TOKENS = 512  # of prompts that are not known yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What to plan: sizes in pixels, text in tokens, memory in GiB as it is printed on the box.

    `references` are pictures of `reference_size` that an edit is about. Without `guided` there is no negative pass.
    """

    width: int
    height: int
    frames: int = 1
    text_tokens: int = TEXT_TOKENS
    references: int = 0
    reference_size: tuple[int, int] = (1024, 1024)
    guided: bool = True
    vae_dtype: torch.dtype = torch.float32
    vram: float = 24.0
    ram: float = 32.0
    card: str = DEFAULT_CARD
    is_windows: bool = sys.platform == "win32"


def facts(handle: ModelHandle, question: Question) -> dict[str, Any]:
    """Return the plan as plain JSON values. Raises ValueError for a card that is not known or too small a one."""
    card = card_named(question.card)
    if card is None:
        raise ValueError(f"Nothing is known of the speed of {question.card!r}: choose {', '.join(CARDS)}.")
    dtype, latent_format = handle.dtype or torch.bfloat16, handle.family.latent_format
    loaded = loaded_of(handle, dtype)
    width, height = question.reference_size
    references = [latent_format.shape(1, 1, height, width)] * question.references
    shape = latent_format.shape(1, question.frames, question.height, question.width)
    scene = _scene(handle, shape, dtype, [question.text_tokens] * (1 + question.guided), references)
    machine = _machine(question, card)
    plan, job = plan_for(loaded, scene, card, machine, handle.memory)
    counts = Counter(source.value for source in plan.sources.values())
    return {
        "model": handle.checkpoint.path.name,
        "variant": handle.identity.variant,
        "format": handle.identity.weight_format,
        "size": f"{question.width}x{question.height}x{question.frames}",
        "card": question.card,
        "vram_gb": question.vram,
        "ram_gb": question.ram,
        "blocks": len(job.blocks),
        "resident": len(job.blocks) - len(plan.streaming),
        "streaming": list(plan.streaming),
        "slots": plan.num_slots,
        "sources": dict(counts),
        "interleaved": plan.interleaved,
        "chunk_rows": handle.memory.chunk_rows or None,
        "block_gb": _gb(max(job.blocks)),
        "other_weights_gb": _gb(job.others),
        "computation_gb": _gb(plan.working),
        "peak_gb": _gb(plan.peak),
        "pinned_ram_gb": _gb(plan.pinned),
        "crossing_gb": _gb(plan.crossing),
        "step_seconds": _rounded(plan.step_seconds),
        "compute_seconds": _rounded(plan.compute_seconds),
        "text_encoder": _encoding(_published_encoder(handle, question), machine),
        "image_encoder": _encoding(_published_image_encoder(handle), machine),
        "vae": _decoding(question, machine),
        "lines": describe(plan, len(job.blocks)),
    }


def _encoding(parts: Sequence[Footprint], machine: Machine) -> dict[str, Any] | None:
    """Return how the parts of an encoder take their turns; None for a model without, or with one that is not known."""
    if not parts:
        return None
    plans = [plan_of(part, machine.vram - machine.headroom) for part in parts]
    return {"streams": any(plan.streaming for plan in plans), "peak_gb": _gb(max(plan.peak for plan in plans))}


def _published_encoder(handle: ModelHandle, question: Question) -> list[Footprint]:
    """Return the parts of the text encoder; none of a miniature's."""
    width, dtype = handle.identity.config.text_dim, torch.bfloat16
    if handle.family.name == WAN and width == TextEncoderConfig().dim:
        return [umt5.needed(TextEncoderConfig(), dtype, question.text_tokens)]
    if handle.family.name == QWEN_IMAGE and width == VLConfig().hidden:
        config = VLConfig()
        cell = config.vision.patch_size * config.vision.merge
        cells = tuple(side // cell for side in question.reference_size)
        tokens = question.text_tokens + question.references * cells[0] * cells[1]
        parts = [qwen_vl.needed_to_read(config, dtype, tokens)]
        return parts + [qwen_vl.needed_to_see(config, dtype, cells)] * bool(question.references)
    return []


def _published_image_encoder(handle: ModelHandle) -> list[Footprint]:
    config = ImageEncoderConfig()
    is_published = handle.family.name == WAN and handle.identity.config.image_dim == config.dim
    return [clip.needed(config, torch.float16)] if is_published else []


def _decoding(question: Question, machine: Machine) -> dict[str, Any]:
    """Return in which mode the published VAE decodes, the first that fits; tiles where none does."""
    config, dtype = VAEConfig(), question.vae_dtype
    size = (question.height, question.width, question.frames)
    weights, free = weight_bytes(config, dtype), machine.vram - machine.headroom
    needed = partial(decode_bytes, config, dtype, *size)
    for mode in MODES:
        if (peak := weights + needed(mode)) <= free:
            return {"mode": mode.name, "dtype": _name(dtype), "peak_gb": _gb(peak)}
    return {"mode": "tiles", "dtype": _name(dtype), "peak_gb": _gb(free)}


def plan_here(handle: ModelHandle, latent_shape: tuple[int, ...]) -> list[str]:
    """Return the plan for latents [B, C, T, h, w] on this machine, in words, or why there is none.

    Two prompts are assumed, and that other models leave the card, as the sampler asks them to.
    """
    device = host.device()
    if computes_in_ram(device):
        return [f"This machine computes on its {device.type}: the weights stay in RAM, nothing has to stream."]
    dtype = compute_dtype(handle, device)
    scene = replace(_scene(handle, latent_shape, dtype, [TEXT_TOKENS] * 2), ops=spelled(handle, device)[0])
    loaded = loaded_of(handle, dtype)
    machine = machine_of(device)
    machine = replace(machine, vram=max(machine.vram, host.total_memory(device) - SYSTEM_VRAM))
    try:
        plan, job = plan_for(loaded, scene, card_of(device), machine, handle.memory)
    except ValueError as error:
        return [str(error)]
    return describe(plan, len(job.blocks))


def render(found: Mapping[str, Any]) -> str:
    """Return the plan as lines of text."""
    title = "{model} ({variant}, {format}) at {size} on a {card} with {vram_gb:g} GB, {ram_gb:g} GB of RAM"
    lines = [title.format_map(found), *(f"  {line}" for line in found["lines"])]
    for name in ("text_encoder", "image_encoder"):
        if encoding := found[name]:
            how = "in part layer by layer" if encoding["streams"] else "whole"
            shown = name.replace("_", " ")
            lines.append(f"  before it the {shown}, {how}: VRAM at most {encoding['peak_gb']:.2f} GB")
    decoding = found["vae"]
    how = {"tiles": "in tiles", "whole": "whole frames"}.get(decoding["mode"], f"exact, {decoding['mode']}")
    lines.append(f"  after it the VAE in {decoding['dtype']}, {how}: VRAM at most {decoding['peak_gb']:.2f} GB")
    return "\n".join(lines)


def _scene(
    handle: ModelHandle,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Sequence[int],
    references: Sequence[tuple[int, ...]] = (),
) -> Scene:
    family, config = handle.family, handle.identity.config
    return Scene(
        family=family,
        config=config,
        latent_shape=latent_shape,
        conditionings=conditionings_of(family, config, latent_shape, rows, references),
        dtype=dtype,
        chunk_rows=handle.memory.chunk_rows,
        kept_latents=max(solver.kept_latents for solver in SOLVERS.values()),
        loras=working(handle.loras),
    )


def _machine(question: Question, card: Card) -> Machine:
    return Machine(
        vram=int(question.vram * GIB) - SYSTEM_VRAM,
        ram=max(0, int(question.ram * GIB) - SYSTEM_RAM),
        total_ram=int(question.ram * GIB),
        link=card.link,
        is_windows=question.is_windows,
        libraries=card.libraries,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(num_bytes: int) -> float:
    return round(num_bytes / GB, 3)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
