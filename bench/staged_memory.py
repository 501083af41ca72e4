"""How much RAM does a model take that streams from its file?

    python -m wanqwen.bench.staged_memory [--model 14B] [--folder DIR]

Writes a file of the published size and names, most of it holes, with random numbers here and there; lets every block
of it stream through the ring with a computation that does next to nothing, and prints what the process took of RAM at
its fullest: its own (RssAnon: two staging buffers, two slots, the other weights), and mapped files beside it. RAM
stands for the device, so its slots count too.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ..core.blocks import Run, run_blocks
from ..core.memory import resident
from ..core.memory.placement import GB, Plan
from ..core.memory.slab import Loaded
from ..core.memory.supply import Source
from ..core.weights.assemble import prepare
from ..core.weights.reader import open_checkpoint
from .files import shapes_of, write_sparse
from .models import WAN, WAN_1_3B, WAN_14B

MODELS = {"14B": WAN_14B, "1.3B": WAN_1_3B}
RANDOM_SPOTS, SPOT_BYTES = 200, 1 << 16
WALKS = 2


def main() -> None:
    """Write, stream, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="14B")
    parser.add_argument("--folder", type=Path, help="where the file may lie (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = write_spotted(Path(folder) / "sparse.safetensors", MODELS[options.model])
        before = _ram()
        started = time.perf_counter()
        most = stream(path, MODELS[options.model])
        seconds = time.perf_counter() - started
        sys.stdout.write(
            f"file {path.stat().st_size / GB:.2f} GB, {WALKS} walks in {seconds:.1f} s; "
            f"before {before['RssAnon'] / GB:.2f} GB; at most {most['RssAnon'] / GB:.2f} GB of its own, "
            f"{most['RssFile'] / GB:.2f} GB of mapped files\n"
        )


def write_spotted(path: Path, config: object) -> Path:
    """Write a bf16 file with the names and shapes of a model, most of it holes."""
    begin, end = write_sparse(path, shapes_of(WAN, config))
    rng, size = random.Random(0), min(SPOT_BYTES, end - begin)
    with open(path, "r+b") as file:
        for _ in range(RANDOM_SPOTS):
            file.seek(rng.randrange(begin, end - size + 1))
            file.write(rng.randbytes(size))
    return path


def stream(path: Path, config: object) -> dict[str, int]:
    """Let every block stream from the file, and return the most RAM that this process had meanwhile."""
    checkpoint = open_checkpoint(path)
    names = {name: name for name in checkpoint.tensors}
    weights = prepare(lambda: WAN.build(config), names, checkpoint, float32=WAN.float32, dtype=torch.bfloat16)
    loaded = Loaded(weights, weights.module.blocks)
    every = tuple(range(len(loaded.blocks)))
    plan = Plan(streaming=every, num_slots=2, sources=dict.fromkeys(every, Source.DISK))
    most: dict[str, int] = {}
    resident.computes_in_ram = lambda device: False
    with torch.inference_mode(), resident.placed(loaded, torch.device("cpu"), lambda at_least: plan) as residency:
        run = Run(hooks=(residency,))

        def call(i: int, block: nn.Module, state: float) -> float:
            for key, value in _ram().items():
                most[key] = max(most.get(key, 0), value)
            return state + float(block.modulation.sum())

        for _ in range(WALKS):
            run_blocks(loaded.blocks, 0.0, call, run=run)
    return most


def _ram() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {key: int(value.split()[0]) * 1024 for key, value in fields.items()}


if __name__ == "__main__":
    main()
