"""What CudaLink, Supply and BlockSwap ask of streams, events and threads orders every use of every buffer."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import CudaLink
from wanqwen.core.memory.supply import Source, Supply

from .races import RaceError, Races, cuda
from .toy import DEPTH, forward, from_file, in_memory, inputs

pytestmark = pytest.mark.usefixtures("cuda_runtime")

CUDA = torch.device("cuda")
EVERY = (Source.PINNED, Source.STAGED, Source.DISK)


def run(races: Races, path: Path, rng: random.Random, make_link: Callable[..., CudaLink] = CudaLink) -> None:
    """Run a random placement for a few forwards; the compute stream reads the slots that the blocks are bound to."""
    loaded = from_file(path)
    layouts = loaded.layouts()[:-1]
    streaming = sorted(rng.sample(range(DEPTH), rng.randint(1, DEPTH)))
    kinds = {i: rng.choice(EVERY) for i in streaming}
    own = {i: torch.empty(layouts[i].nbytes, dtype=torch.uint8) for i in range(DEPTH) if i not in streaming}
    size = max(layout.nbytes for layout in layouts)
    ring = [torch.empty(size, dtype=torch.uint8) for _ in range(rng.randint(1, 4))]
    link = make_link(CUDA, len(own) + len(ring))
    swap = BlockSwap(own, ring, Supply(loaded, layouts, kinds, link, CUDA))
    swap.start()
    wanted = [forward(in_memory(path).blocks, x, []) for x in inputs()]

    class Compute:
        def before(self, i: int) -> None:
            races.act(races.compute, reads=(loaded.blocks[i].linear.weight,))

        def after(self, i: int) -> None:
            pass

    try:
        for x, out in zip(inputs(), wanted, strict=True):
            assert torch.equal(forward(loaded.blocks, x, [swap, Compute()]), out)
        assert races.waits == [], "the CPU waited for a stream"
    finally:
        swap.close()


def test_nothing_races(path: Path) -> None:
    for seed in range(60):
        with cuda() as races:
            run(races, path, random.Random(seed))


class NoWait(CudaLink):
    def wait(self, slot: int) -> None:
        """Let the compute run before the copy is done."""


class NoUse(CudaLink):
    def used(self, slot: int) -> None:
        """Forget that the compute reads the slot."""


class NoFence(CudaLink):
    def fence(self) -> Callable[[], None]:
        """Let staging buffers be filled again at once."""
        return lambda: None


class NoOrder(CudaLink):
    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        """Copy without waiting for the last use."""
        with torch.cuda.stream(self.stream):
            device[: host.numel()].copy_(host, non_blocking=True)
            self.ready[slot].record(self.stream)


@pytest.mark.parametrize("broken", [NoWait, NoUse, NoFence, NoOrder])
def test_each_missing_order_is_found(path: Path, broken: type[CudaLink]) -> None:
    found = 0
    for seed in range(40):
        with cuda() as races:
            try:
                run(races, path, random.Random(seed), broken)
            except RaceError:
                found += 1
    assert found
