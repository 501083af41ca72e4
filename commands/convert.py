"""`python -m wanqwen convert`: a model in other names, or in another format."""

import argparse
import sys
from pathlib import Path

from ..conversion import convert
from ..core.weights.convert import Wish
from ..core.weights.targets import SAME, TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen convert`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<18} {target.title}" for name, target in TARGETS.items())
    add = parser.add_argument
    add("file", type=Path, help="of a model: any that `inspect` knows; of shards any one, or their folder")
    add("--to", default=SAME, metavar="FORMAT", help=f"one of those below (default {SAME})")
    add("--spelling", help="official, diffusers, comfyui, kijai, huggingface: whose names (default: the file's own)")
    add("--prefix", help="before every name, such as model.diffusion_model. (default: the spelling's)")
    add("--out", type=Path, required=True, help=".safetensors or .gguf")
    add("--keep", action="append", default=[], metavar="PATTERN", help="names of weights that stay precise, with *")
    add("--variant", help="which Qwen-Image model the file holds, if it does not tell")
    add("--requantise", action="store_true", help="round what has 8 bits or fewer already a second time")
    add("--force", action="store_true", help="replace --out if it exists")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert as the command line says, and print the new file's path."""
    wish = Wish(
        target=options.to.lower(),
        spelling=options.spelling and options.spelling.lower(),
        prefix=options.prefix,
        keep=tuple(options.keep),
        requantise=options.requantise,
    )
    out = convert(options.file, options.out, wish, _terminal, variant=options.variant, replace=options.force)
    sys.stdout.write(f"{out.resolve()}\n")
    return 0


def _terminal(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
