"""`python -m wanqwen plan`: what a run takes of a card, from the model's header alone."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..loading import load_model
from ..plans import DEFAULT_CARD, Question, facts, render
from ..qwen_image.config import VARIANTS
from .options import PRECISIONS, add_run_arguments, defaults_of, dtype_of, memory_options, size_of, with_loras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen plan`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="diffusion model")
    add("--variant", choices=list(VARIANTS), help="which Qwen-Image model the file holds, if it does not tell")
    add("--size", help="WIDTHxHEIGHTxFRAMES, for pictures WIDTHxHEIGHT (default: the published one)")
    add("--vram", type=float, default=24.0, help="GB of the card (default 24)")
    add("--ram", type=float, default=32.0, help="GB of RAM (default 32)")
    add("--card", default=DEFAULT_CARD, help=f"whose speed to take (default {DEFAULT_CARD})")
    add("--precision", choices=PRECISIONS, default="auto", help="of the diffusion model (auto: bf16)")
    add("--vae-precision", choices=PRECISIONS, default="fp32")
    add("--text-tokens", type=int, default=512, help="length of the prompts (default 512)")
    add("--references", type=int, default=0, help="pictures of 1024 x 1024 that an edit is about")
    add("--no-guidance", action="store_true", help="no negative prompt, as with distilled models")
    add("--json", action="store_true", help="print JSON")
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    model = load_model(options.model, dtype_of(options.precision), variant=options.variant)
    width, height, frames = size_of(options.size or defaults_of(model).size, model)
    question = Question(
        width=width,
        height=height,
        frames=frames,
        text_tokens=options.text_tokens,
        references=options.references,
        guided=not options.no_guidance,
        vae_dtype=dtype_of(options.vae_precision) or torch.float32,
        vram=options.vram,
        ram=options.ram,
        card=options.card,
    )
    model = with_loras(replace(model, memory=memory_options(options)), options.lora)
    found = facts(model, question)
    sys.stdout.write((json.dumps(found, indent=2) if options.json else render(found)) + "\n")
    return 0
