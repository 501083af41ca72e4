"""How long does `inspect` take, beside Python alone and beside Python importing PyTorch, which it does without?

    python -m wanqwen.bench.inspect_files [FILE ...] [--rounds 7]

By turns, each in a process of its own: `python -c pass`, `python -c "import torch"`, and `python -m wanqwen inspect
FILE --json`. Without files, of full size and holes but for their headers: Wan 2.1 14B as one safetensors file, as a
folder of shards with an index, as .pth (whose numbers are all one, so that it is small), and as GGUF with a vocabulary
of 256,000 tokens in its header, as text encoders have (needs the package gguf). Least and median seconds of the whole
process; opening is what of that goes to the header and what the file is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch

from ..core.weights.reader import INDEX, open_checkpoint
from ..families import identify
from .files import Shapes, shapes_of, write_sparse
from .models import WAN, WAN_14B

SHARDS, TOKENS = 6, 256_000
ALONE, IMPORT = "python", "import torch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what is to be inspected if nothing was named, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or write_all(Path(folder), shapes_of(WAN, WAN_14B))
        sys.stdout.write(report(files, options.rounds))


def write_all(folder: Path, shapes: Shapes) -> list[Path]:
    """Write one model in each container."""
    single, pickled, packed = (folder / f"wan_14B.{suffix}" for suffix in ("safetensors", "pth", "gguf"))
    sharded = folder / "wan_14B_shards"
    write_sparse(single, shapes)
    sharded.mkdir()
    numbers = cycle(range(1, SHARDS + 1))
    shard_of = {name: f"model-{next(numbers):05}-of-{SHARDS:05}.safetensors" for name in shapes}
    for shard in set(shard_of.values()):
        write_sparse(sharded / shard, {name: shape for name, shape in shapes.items() if shard_of[name] == shard})
    (sharded / f"model{INDEX}").write_text(json.dumps({"weight_map": shard_of}))
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, pickled)
    write_gguf(packed, shapes)
    return [single, sharded, pickled, packed]


def write_gguf(path: Path, shapes: Shapes) -> None:
    """Write tensors in F16, all holes, behind a large vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "wan")
    writer.add_token_list([f"token {i}" for i in range(TOKENS)])
    writer.add_token_scores([0.0] * TOKENS)
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float16), size)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)


def report(files: Sequence[Path], rounds: int) -> str:
    """Run all by turns and return what came of it as text."""
    commands = {str(path): ["-m", "wanqwen", "inspect", str(path), "--json"] for path in files}
    commands = {ALONE: ["-c", "pass"], IMPORT: ["-c", IMPORT], **commands}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    base = seconds[IMPORT]
    lines = []
    for name, found in seconds.items():
        opening = "" if name in (ALONE, IMPORT) else f"; opening {_opening(Path(name)):.3f} s"
        lines.append(
            f"  {Path(name).name:<24}{min(found):6.3f} s (median {statistics.median(found):.3f}), of {IMPORT} "
            f"{min(found) / min(base):.2f} ({statistics.median(found) / statistics.median(base):.2f}){opening}"
        )
    return "\n".join(lines) + "\n"


def _opening(path: Path) -> float:
    started = time.perf_counter()
    identify(open_checkpoint(path))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
