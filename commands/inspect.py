"""`python -m wanqwen inspect`: what a checkpoint or a LoRA is, from its header alone."""

import argparse
import json
import sys
from pathlib import Path

from ..core.weights.lora import is_lora
from ..core.weights.reader import open_checkpoint
from ..families import identify
from ..inspection import describe, describe_lora, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen inspect`."""
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the file is."""
    checkpoint = open_checkpoint(options.file)
    facts = describe_lora(checkpoint) if is_lora(checkpoint) else describe(checkpoint, identify(checkpoint))
    sys.stdout.write((json.dumps(facts, indent=2) if options.json else render(facts)) + "\n")
    return 0
