"""How long does loading a model take beside reading its file, and how much RAM?

    python -m wanqwen.bench.load_file [--folder DIR] [--rounds N] [--against diffusers]

Writes a file of the size and names of Wan 2.1 T2V-1.3B in bf16 with random numbers, reads it once so that the system
has it in memory, and then by turns, each in a process of its own: `cat FILE > /dev/null`; our loading as a run on the
CPU does it (mapped; every page is touched); as a run on a card does it (every block read into its slab, in RAM); and
for comparison with the latter the whole file read into RAM by one call. With `--against diffusers` also their
`from_single_file`. Times begin after the imports; seconds of work are those of the processor, which other programs
don't change; RAM is what the process took at its fullest beyond what it had before.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.memory.slab import Loaded
from ..core.weights.assemble import Weights, prepare
from ..core.weights.reader import open_checkpoint
from ..families import identify
from ..wan.config import WanConfig
from .models import WAN, WAN_1_3B

PAGE = 4096
PATTERN = 1 << 22  # numbers that are made; the file repeats them
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
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        way, file = options.one
        sys.stdout.write(json.dumps(measured(WAYS[way], Path(file))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = write_random(Path(folder) / "wan2.1_t2v_1.3B_bf16.safetensors")
        (path.parent / "config.json").write_text(json.dumps(CONFIG))
        ways = ["mapped", "slabs", "read whole", *([options.against] if options.against else [])]
        sys.stdout.write(report(path, compared(path, ways, options.rounds)))


def write_random(path: Path, config: WanConfig = WAN_1_3B) -> Path:
    """Write a bf16 file with the names and shapes of a model and small random numbers."""
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in WAN.build(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    content = memoryview(pattern.view(torch.uint8).numpy())
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(content)):
            file.write(content[: end - begin])
    return path


def compared(path: Path, ways: Sequence[str], rounds: int) -> dict[str, list[Row]]:
    """Return seconds and bytes of each way in each round."""
    found: dict[str, list[Row]] = {way: [] for way in ("cat", *ways)}
    _cat(path)
    for _ in range(rounds):
        found["cat"].append(_cat(path))
        for way in ways:
            command = [sys.executable, "-m", __spec__.name, "--one", way, str(path)]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return found


def report(path: Path, found: dict[str, list[Row]]) -> str:
    """Return the medians as text."""
    size, (base, base_work, _) = path.stat().st_size, _medians(found["cat"])
    lines = [f"a file of {size / 1e9:.2f} GB; medians"]
    for way, rows in found.items():
        seconds, work, held = _medians(rows)
        lines.append(
            f"  {way:<12}{seconds:7.3f} s, work {work:6.3f} s   over cat {seconds / base:6.2f}, work "
            f"{work / base_work:6.2f}   RAM {held / 1e9:5.2f} GB, over the file's size {held / size:.3f}"
        )
    return "\n".join(lines) + "\n"


def measured(way: Callable[[Path], object], path: Path) -> Row:
    """Return what a way takes; its bytes are the most that the process has beyond those of before."""
    import numpy  # noqa: F401  torch brings it in at its first use otherwise

    gc.collect()
    before = _status("VmRSS")
    started, work = time.perf_counter(), _work(resource.RUSAGE_SELF)
    kept = way(path)
    seconds, work = time.perf_counter() - started, _work(resource.RUSAGE_SELF) - work
    held = _status("VmHWM") - before
    del kept
    return seconds, work, held


def mapped(path: Path) -> nn.Module:
    """Load as a run on the CPU does, and touch every page."""
    module = _prepared(path).materialise()
    for tensor in module.state_dict().values():
        _bytes(tensor)[::PAGE].sum(dtype=torch.int64)
    return module


def slabs(path: Path) -> list[Tensor]:
    """Read every block, and all other weights, into a slab in RAM."""
    weights = _prepared(path)
    loaded = Loaded(weights, weights.module.get_submodule(WAN.blocks))
    buffers = []
    for layout in loaded.layouts():
        buffers.append(torch.empty(layout.nbytes, dtype=torch.uint8))
        loaded.fill(layout, buffers[-1])
    return buffers


def diffusers(path: Path) -> nn.Module:
    """Load the file as diffusers does, and touch every page."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel.from_single_file(str(path), config=str(path.parent), torch_dtype=torch.bfloat16)
    for tensor in module.state_dict().values():
        _bytes(tensor)[::PAGE].sum(dtype=torch.int64)
    return module


WAYS: dict[str, Callable[[Path], object]] = {
    "mapped": mapped,
    "slabs": slabs,
    "read whole": Path.read_bytes,
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


def _medians(rows: Sequence[Row]) -> Row:
    seconds, work, held = (statistics.median(column) for column in zip(*rows, strict=True))
    return seconds, work, int(held)


if __name__ == "__main__":
    main()
