"""How fast is a model converted, and in how much memory?

    python -m wanqwen.bench.convert [--folder DIR] [--layers N ...] [TARGET ...]

Writes a file of the names and shapes of Wan 2.1 T2V-1.3B in bf16 with random numbers (2.8 GB), and smaller ones of
fewer blocks, and converts each, every time in a process of its own. Memory is what that process took at its fullest
beyond what it had before: it should be the same whatever the size of the file. MB/s are those of the source, by the
clock and by the work of the processor, which other programs don't change. Copying is what the disk and the system do by
themselves.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..conversion import convert
from ..core.weights.convert import Wish
from ..core.weights.targets import TARGETS
from .files import shapes_of, write_random
from .memory import watched
from .models import WAN, WAN_1_3B

DEFAULT_TARGETS = ("fp16", "fp8_scaled", "int8", "gguf_q8_0")
DEFAULT_LAYERS = (10, 30)
COPY = "copy"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, convert each, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=DEFAULT_TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--folder", type=Path, help="where the files may lie (default: a temporary folder)")
    parser.add_argument("--layers", type=int, nargs="+", default=DEFAULT_LAYERS, help="blocks of each file")
    parser.add_argument("--one", nargs=3, metavar=("TARGET", "FILE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        target, file, out = options.one
        sys.stdout.write(json.dumps(measured(target, Path(file), Path(out))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for layers in options.layers:
            shapes = shapes_of(WAN, replace(WAN_1_3B, num_layers=layers))
            path = write_random(Path(folder) / "source.safetensors", shapes)
            size = path.stat().st_size
            for target in (COPY, *options.targets):
                out = path.with_name(f"out{'.gguf' if target.startswith('gguf') else '.safetensors'}")
                command = [sys.executable, "-m", __spec__.name, "--one", target, str(path), str(out)]
                seconds, work, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                made = out.stat().st_size
                sys.stdout.write(
                    f"{layers:3} blocks, {size / 1e9:.2f} GB -> {made / 1e9:.2f} GB {target:<18} {seconds:6.1f} s, "
                    f"{size / seconds / 1e6:5.0f} MB/s, by work {size / work / 1e6:5.0f} MB/s, "
                    f"at most {peak / 1e6:4.0f} MB of memory\n"
                )
                sys.stdout.flush()
                out.unlink()


def measured(target: str, file: Path, out: Path) -> tuple[float, float, int]:
    """Return the seconds that a conversion takes, those of work, and the bytes beyond what there was before."""
    if target == COPY:
        _, *figures = watched(lambda: shutil.copyfile(file, out))
    else:
        _, *figures = watched(lambda: convert(file, out, Wish(target=target), lambda text: None))
    seconds, work, peak = figures
    return seconds, work, peak


if __name__ == "__main__":
    main()
