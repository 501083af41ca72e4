"""`python -m wanqwen doctor`: which kernels work on this machine, and how well."""

import argparse
import sys

from ..doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `python -m wanqwen doctor`: none."""
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is found as it is found."""
    for line in examine():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0
