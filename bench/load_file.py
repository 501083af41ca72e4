"""How long does loading a model take beside reading its file, and how much RAM?

    python -m wanqwen.bench.load_file [--folder DIR] [--rounds N] [--against diffusers]

Writes a file of the size and names of Wan 2.1 T2V-1.3B in bf16 with random numbers, reads it once so that the system
has it in memory, and then by turns, each in a process of its own: `cat FILE > /dev/null`; our loading as a run on the
CPU does it (mapped; every page is touched); as a run on a card that holds the model does it (card: every block through
one of two buffers from which the card copies it meanwhile, which is left out); as a run does it whose blocks stream
from RAM (slabs: every block in a slab of its own); and as the floor for the latter, what any way takes that ends with
the bytes in memory of its own: fresh memory in large pages, filled by as many threads as there are processors, and
nothing else. With `--against diffusers` also their `from_single_file`. Times begin after the imports; seconds of work
are those of the processors, which other programs change less; RAM is what the process took at its fullest beyond what
it had before.

A virtual machine may have given memory that nobody used back to its host, and gets it back slowly, so each process
first takes RAM of the file's size and a fifth more, in large pages and in small ones, and lets it go again. `--cold`
leaves that out.
"""

import argparse
import gc
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.memory.link import SynchronousLink
from ..core.memory.pinned import HostBuffer
from ..core.memory.slab import Loaded
from ..core.memory.supply import Source, Supply
from ..core.weights.assemble import Weights, prepare
from ..core.weights.reader import open_checkpoint
from ..families import identify
from .files import shapes_of, write_random
from .models import WAN, WAN_1_3B

PAGE = 4096
FLOOR_PIECE = 4 << 20  # bytes: the fastest here, of 256 KiB to 64 MiB
ROUNDS = 5
Row = tuple[float, float, int]  # seconds on the clock, seconds of work, bytes of RAM
CONFIG = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": WAN_1_3B.num_heads, "attention_head_dim": 128,
    "ffn_dim": WAN_1_3B.ffn_dim, "num_layers": WAN_1_3B.num_layers, "text_dim": WAN_1_3B.text_dim,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the file may lie (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--against", choices=("diffusers",))
    parser.add_argument("--cold", action="store_true", help="take memory as it comes")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        way, file = options.one
        sys.stdout.write(json.dumps(measured(WAYS[way], Path(file), options.cold)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = write_random(Path(folder) / "wan2.1_t2v_1.3B_bf16.safetensors", shapes_of(WAN, WAN_1_3B))
        (path.parent / "config.json").write_text(json.dumps(CONFIG))
        ways = ["mapped", "card", "slabs", "floor", *([options.against] if options.against else [])]
        sys.stdout.write(report(path, compared(path, ways, options.rounds, options.cold)))


def compared(path: Path, ways: Sequence[str], rounds: int, is_cold: bool) -> dict[str, list[Row]]:
    """Return seconds and bytes of each way in each round."""
    found: dict[str, list[Row]] = {way: [] for way in ("cat", *ways)}
    _cat(path)
    for _ in range(rounds):
        found["cat"].append(_cat(path))
        for way in ways:
            command = [sys.executable, "-m", __spec__.name, "--one", way, str(path), *["--cold"] * is_cold]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return found


def report(path: Path, found: dict[str, list[Row]]) -> str:
    """Return the least of each figure as text: what other programs do to one only adds to it; and the median times."""
    size = path.stat().st_size
    least = {way: [min(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    (base, base_work, _), (floor, floor_work, _) = least["cat"], least["floor"]
    lines = [f"a file of {size / 1e9:.2f} GB; the least of {len(found['cat'])} rounds, work and RAM likewise"]
    for way, (seconds, work, held) in least.items():
        median = statistics.median(row[0] for row in found[way])
        lines.append(
            f"  {way:<10}{seconds:7.3f} s (median {median:.3f}), work {work:.3f} s; over cat {seconds / base:.2f}, "
            f"work {work / base_work:.2f}; over the floor {seconds / floor:.2f}, work {work / floor_work:.2f}; "
            f"RAM {held / 1e9:.2f} GB, over the file's size {held / size:.3f}"
        )
    return "\n".join(lines) + "\n"


def measured(way: Callable[[Path], object], path: Path, is_cold: bool) -> Row:
    """Return what a way takes; its bytes are the most that the process has beyond those of before."""
    import numpy  # noqa: F401  torch brings it in at its first use otherwise

    if not is_cold:
        _take(path.stat().st_size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    started, work = time.perf_counter(), _work(resource.RUSAGE_SELF)
    kept = way(path)
    seconds, work = time.perf_counter() - started, _work(resource.RUSAGE_SELF) - work
    held = _status("VmHWM") - before
    del kept
    return seconds, work, held


def _take(size: int) -> None:
    """Have the system get memory from its host: a tenth more than `size` in large pages, and a tenth in small ones."""
    taken = HostBuffer(size * 11 // 10).bytes, torch.empty(size // 10, dtype=torch.uint8)
    for part in taken:
        part.fill_(1)


def mapped(path: Path) -> nn.Module:
    """Load as a run on the CPU does, and touch every page."""
    module = _prepared(path).materialise()
    for tensor in module.state_dict().values():
        _bytes(tensor)[::PAGE].sum(dtype=torch.int64)
    return module


def card(path: Path) -> Loaded:
    """Load as a run on a card that holds the model does, but for the copies, which the card makes meanwhile."""
    return _supplied(path, Source.DISK)


def slabs(path: Path) -> Loaded:
    """Load as a run does whose blocks all stream to a card from RAM, until they are there to be registered."""
    return _supplied(path, Source.STAGED)


def _supplied(path: Path, source: Source) -> Loaded:
    weights = _prepared(path)
    loaded = Loaded(weights, WAN.blocks(weights.module))
    *blocks, others = loaded.layouts()
    in_ram, on_card = HostBuffer(others.nbytes).bytes, torch.empty(0, dtype=torch.uint8)
    loaded.fill(others, in_ram)
    others.bind(in_ram)
    supply = Supply(loaded, blocks, dict.fromkeys(range(len(blocks)), source), _NoCopies(), torch.device("cpu"))
    try:
        for i in range(len(blocks)):
            supply.load(i, i, on_card)
        for i in range(len(blocks)):
            supply.wait(i)
    finally:
        supply.close()
    return loaded


class _NoCopies(SynchronousLink):
    """A way to a card that takes no time."""

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        pass


def floor(path: Path) -> mmap.mmap:
    """Read the file into memory, by the system's own means alone."""
    size = path.stat().st_size
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, size, FLOOR_PIECE)
        counts = pool.map(lambda at: os.preadv(file.fileno(), [view[at : at + FLOOR_PIECE]], at), starts)
        assert sum(counts) == size
    return memory


def diffusers(path: Path) -> nn.Module:
    """Load the file as diffusers does, and touch every page."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel.from_single_file(str(path), config=str(path.parent), torch_dtype=torch.bfloat16)
    for tensor in module.state_dict().values():
        _bytes(tensor)[::PAGE].sum(dtype=torch.int64)
    return module


WAYS: dict[str, Callable[[Path], object]] = {
    "mapped": mapped,
    "card": card,
    "slabs": slabs,
    "floor": floor,
    "diffusers": diffusers,
}


def _prepared(path: Path) -> Weights:
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint)
    return prepare(
        lambda: WAN.build(identity.config),
        identity.names,
        checkpoint,
        float32=WAN.float32,
        dtype=torch.bfloat16,
        ignored=identity.ignored,
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _cat(path: Path) -> Row:
    started, work = time.perf_counter(), _work(resource.RUSAGE_CHILDREN)
    with open("/dev/null", "wb") as sink:
        subprocess.run(["cat", str(path)], stdout=sink, check=True)
    return time.perf_counter() - started, _work(resource.RUSAGE_CHILDREN) - work, 0


def _work(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


if __name__ == "__main__":
    main()
