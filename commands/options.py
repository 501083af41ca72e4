"""What commands that run or plan a model share: options, sizes, and what it takes when nothing was asked for."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.types import SOURCES, MemoryOptions, ModelHandle
from ..loading import DEMO_FOLDER, with_lora
from ..qwen_image.config import NEGATIVE_PROMPT as QWEN_NEGATIVE
from ..qwen_image.editing import ALIGNED, PUBLISHED
from ..qwen_image.files import NAME as QWEN_IMAGE
from ..wan.config import NEGATIVE_PROMPT as WAN_NEGATIVE
from ..wan.family import fit_clip
from ..wan.files import NAME as WAN

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a run takes when nothing else was asked for."""

    size: str
    negative: str
    steps: int
    guidance: float
    solver: str
    edit_size: str = PUBLISHED
    text_encoder: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None


DEFAULTS = {
    WAN: Defaults(size="832x480x81", negative=WAN_NEGATIVE, steps=30, guidance=5.0, solver="unipc"),
    QWEN_IMAGE: Defaults(size="1328x1328x1", negative=QWEN_NEGATIVE, steps=50, guidance=4.0, solver="euler"),
}
# What the miniatures were trained for; their other files lie beside them.
MINIATURES = {
    WAN: {"size": "64x64x9", "negative": ""},
    QWEN_IMAGE: {"size": "112x112x1", "guidance": 3.0, "edit_size": ALIGNED},
}


def defaults_of(model: ModelHandle) -> Defaults:
    """Return what a model takes when nothing else was asked for; its other files are known if it is a miniature."""
    name, folder = model.family.name, model.checkpoint.path.resolve().parent
    defaults = DEFAULTS[name]
    if name == WAN:
        defaults = replace(defaults, negative=model.identity.config.negative_prompt)
    if folder != DEMO_FOLDER.resolve():
        return defaults
    prefix = model.checkpoint.path.name.split("_")[0]
    files = {role: folder / f"{prefix}_{role}.safetensors" for role in ("text_encoder", "vae", "image_encoder")}
    return replace(defaults, **MINIATURES[name], **files)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a model is run."""
    add = parser.add_argument
    add("--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="once more for each other")
    add("--swap", type=int, help="blocks that stream instead of staying on the card (default: planned)")
    add("--slots", type=int, help="of the ring that they stream through (default: planned)")
    add("--source", choices=SOURCES, help="where they wait (default: planned)")
    add("--interleave", action=argparse.BooleanOptionalAction, help="both guidance passes through each block together")
    add("--headroom-gb", type=float, help="VRAM to leave free (default 0.5, on Windows 1)")


def memory_options(options: argparse.Namespace) -> MemoryOptions:
    """Return what the command line fixes of a plan."""
    return MemoryOptions(
        swapped=options.swap,
        slots=options.slots,
        source=options.source,
        interleave=options.interleave,
        headroom=None if options.headroom_gb is None else int(options.headroom_gb * (1 << 30)),
    )


def _lora(text: str) -> tuple[Path, float]:
    """Return file and strength; what follows the last colon may belong to a path."""
    file, colon, strength = text.rpartition(":")
    try:
        return (Path(file), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def with_loras(model: ModelHandle, loras: list[tuple[Path, float]]) -> ModelHandle:
    """Return the model with LoRAs, and tell what is used of each."""
    for file, strength in loras:
        model, lines = with_lora(model, file, strength)
        sys.stderr.writelines(f"{line}\n" for line in lines)
    return model


def dtype_of(name: str) -> torch.dtype | None:
    """Return one of PRECISIONS as a dtype, None for auto."""
    return {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def size_of(text: str, model: ModelHandle) -> tuple[int, int, int]:
    """Return width, height and frames of WIDTHxHEIGHT[xFRAMES]. Raises ValueError for sizes that models can't make."""
    try:
        width, height, frames = (*(int(part) for part in text.lower().split("x")), 1)[:3]
    except ValueError as error:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHTxFRAMES, such as 832x480x81, or WIDTHxHEIGHT") from error
    makes_pictures = model.family.name == QWEN_IMAGE
    fitting = fit_clip(width, height, 1 if makes_pictures else frames)
    if fitting != (width, height, frames):
        rule = "Qwen-Image makes one picture" if makes_pictures else "frames must be 4n + 1"
        found = "x".join(map(str, fitting))
        raise ValueError(f"--size {text}: width and height must be multiples of 16, and {rule}; try {found}")
    return fitting


def lacks_frames(size: str | None) -> bool:
    """Say whether a size was given as WIDTHxHEIGHT alone."""
    return size is not None and size.lower().count("x") == 1
