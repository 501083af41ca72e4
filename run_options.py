"""What the command line lets a run's user choose of memory, LoRAs and fast paths, beside what is made."""

import argparse
from pathlib import Path

from .core.types import (
    ATTENTION_CHOICES,
    COMPILE_CHOICES,
    KERNEL_CHOICES,
    PRODUCT_CHOICES,
    SOURCES,
    FastPaths,
    MemoryOptions,
)


def add_fast_options(parser: argparse.ArgumentParser) -> None:
    """Add what `fast_paths` reads."""
    add = parser.add_argument
    add("--kernels", choices=KERNEL_CHOICES, default=KERNEL_CHOICES[0], help="exact: plain PyTorch, bit for bit")
    add("--products", choices=PRODUCT_CHOICES, default=PRODUCT_CHOICES[0], help="with weights in 8 bits")
    add(
        "--attention",
        choices=ATTENTION_CHOICES,
        default=ATTENTION_CHOICES[0],
        help="auto: exact; int8 and sage: in 8 bits",
    )
    add("--compile", choices=COMPILE_CHOICES, default=COMPILE_CHOICES[0], help="blocks: through torch.compile")


def fast_paths(options: argparse.Namespace) -> FastPaths:
    """Return which faster ways the run may take."""
    return FastPaths(
        kernels=options.kernels, products=options.products, attention=options.attention, compile=options.compile
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add what `memory_options` reads, and LoRAs as `options.lora`: a list of files and strengths."""
    add = parser.add_argument
    add("--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="once more for each other")
    add("--swap", type=int, help="blocks that stream instead of staying on the card (default: planned)")
    add("--slots", type=int, help="of the ring that they stream through (default: planned)")
    add("--source", choices=SOURCES, help="where they wait (default: planned)")
    add("--interleave", action=argparse.BooleanOptionalAction, help="both guidance passes through each block together")
    add("--headroom-gb", type=float, help="VRAM to leave free (default 0.5, on Windows 1)")


def memory_options(options: argparse.Namespace) -> MemoryOptions:
    """Return what is fixed of the run's plan."""
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
