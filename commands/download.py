"""`python -m wanqwen download`: what there is to fetch, and fetching it."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..downloads.catalog import SETS, files_of
from ..downloads.fetch import Progress, fetch, look
from ..downloads.files import gigabytes, layout

LINE_SECONDS = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    add = parser.add_argument
    add("what", nargs="*", metavar="SET", help="sets, or files by name (default: list the sets)")
    add("--to", type=Path, metavar="DIR", help="ComfyUI's models folder, or any to be laid out like it")
    add("--revision", help="branch, tag or commit to take instead of the one that the pack knows")
    add("--check", action="store_true", help="read the files that are there, and compare their sha256 too")
    add(
        "--dry-run",
        action="store_true",
        help="say what is there, what is missing and what room is left; fetch nothing",
    )
    add("--endpoint", metavar="URL", help="address of the hub (default: HF_ENDPOINT, else https://huggingface.co)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if not options.what:
        for known in SETS:
            sys.stdout.write(f"{known.name:<32}{gigabytes(known.size):>8}  {known.title}\n")
        return 0
    files = [file for what in options.what for file in files_of(what)]
    if options.to is None:
        raise ValueError("--to is missing: name ComfyUI's models folder, or any other folder to be laid out like it")
    if options.dry_run and options.revision:
        raise ValueError("--dry-run asks no hub, and so knows the pack's own revisions only: leave out --revision")
    places, write = layout(options.to), _line_writer()
    try:
        if options.dry_run:
            outcomes = look(files, places, write, check=options.check, endpoint=options.endpoint)
        else:
            outcomes = fetch(
                files, places, write, revision=options.revision, check=options.check, endpoint=options.endpoint
            )
    finally:
        write(None)
    sys.stdout.writelines(f"{outcome.line}\n" for outcome in outcomes)
    return 0


def _line_writer() -> Callable[[Progress | None], None]:
    """Return what keeps one line of the terminal up to date, and ends it when told None."""
    latest, shown, last = "", "", 0.0

    def write(progress: Progress | None) -> None:
        nonlocal latest, shown, last
        latest = progress.text if progress else latest
        if latest != shown and (progress is None or time.monotonic() - last > LINE_SECONDS):
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r{latest[:width]:<{width}}")
            sys.stderr.flush()
            shown, last = latest, time.monotonic()
        if progress is None and shown:
            sys.stderr.write("\n")

    return write
