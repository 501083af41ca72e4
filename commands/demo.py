"""`python -m wanqwen demo`: clips, pictures and edits of the bundled miniatures, and their scores."""

import argparse
import sys
import time
from pathlib import Path

from ..demo import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen demo`."""
    parser.add_argument("--count", type=_at_least_one, default=8, help="how many unseen prompts (default 8)")
    parser.add_argument("--seed", type=int, help="of prompts and noise; without it they are new every time")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the video and the contact sheets")
    parser.add_argument("--blind", action="store_true", help="zero the text: the score must fall to chance")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate and score, and print the reports as they come."""
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    for report in show.run(options.count, seed, options.out, blind=options.blind):
        sys.stdout.write(report)
        sys.stdout.flush()
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
