"""Where slabs come from: pinned as far as the system allows, staged, or straight from the file; and what goes wrong."""

import gc
import mmap
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from wanqwen.core import host
from wanqwen.core.memory import supply as supply_module
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.pinned import PAGE, HostBuffer
from wanqwen.core.memory.slab import ALIGNMENT, Loaded
from wanqwen.core.memory.supply import NUM_STAGING, Source, Supply

from .conftest import Runtime
from .late_link import LateLink
from .toy import DEPTH, forward, from_file, in_memory, inputs, is_at_rest, tensors_of

CUDA = torch.device("cuda")


def swap_of(loaded: Loaded, kind: Source, link: LateLink | None = None, ring: int = 2) -> BlockSwap:
    """Return a swap through which every block streams."""
    layouts = loaded.layouts()[:-1]
    size = max(layout.nbytes for layout in layouts)
    slots = [torch.empty(size, dtype=torch.uint8) for _ in range(ring)]
    kinds = dict.fromkeys(range(DEPTH), kind)
    swap = BlockSwap({}, slots, Supply(loaded, layouts, kinds, link or LateLink(), CUDA))
    swap.start()
    return swap


def run(loaded: Loaded, kind: Source, forwards: int = 2) -> None:
    """Stream all blocks through some forwards, and let go."""
    swap = swap_of(loaded, kind)
    try:
        for _ in range(forwards):
            forward(loaded.blocks, inputs(1)[0], [swap])
    finally:
        swap.close()


def test_a_layout_holds_every_tensor_once_and_aligned(path: Path) -> None:
    loaded = in_memory(path)
    *blocks, others = loaded.layouts()
    names = [piece.name for layout in (*blocks, others) for piece in layout.pieces]
    assert sorted(names) == sorted(tensors_of(loaded))
    for layout in (*blocks, others):
        assert all(piece.start % ALIGNMENT == 0 for piece in layout.pieces)
        spans = [(piece.start, piece.start + piece.rest.nbytes) for piece in layout.pieces]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert layout.nbytes == spans[-1][1]


@pytest.mark.parametrize("kind", Source)
def test_slabs_from_the_file_are_those_in_memory(path: Path, kind: Source, cuda_runtime: Runtime) -> None:
    loaded, expected = from_file(path), in_memory(path)
    for layout, other in zip(loaded.layouts(), expected.layouts(), strict=True):
        found, wanted = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
        loaded.fill(layout, found)
        expected.fill(other, wanted)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("limit", [NUM_STAGING, NUM_STAGING + 3, 100])
def test_slabs_are_pinned_once_exactly_and_as_far_as_the_system_allows(
    path: Path, cuda_runtime: Runtime, limit: int
) -> None:
    loaded, cuda_runtime.limit = from_file(path), limit
    swap = swap_of(loaded, Source.PINNED)
    sizes = []
    for _ in range(3):
        forward(loaded.blocks, inputs(1)[0], [swap])
        sizes.append(sum(cuda_runtime.registered.values()))
    masters = list(loaded.masters.values())
    pinned = [master for master in masters if master.is_pinned]
    assert len(masters) == DEPTH and len(pinned) == min(DEPTH, limit)
    assert (cuda_runtime.refusals > 0) == (limit < DEPTH + NUM_STAGING) and not cuda_runtime.error
    swap.close()
    # Page by page: not a power of two anywhere. Staging buffers have been let go.
    assert sum(cuda_runtime.registered.values()) == sum(-(-m.bytes.numel() // PAGE) * PAGE for m in pinned)
    del swap, loaded, masters, pinned
    gc.collect()
    assert cuda_runtime.registered == {}


def test_where_ram_is_short_slabs_are_read_from_the_file_each_time(
    path: Path, cuda_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, wanted = from_file(path), forward(in_memory(path).blocks, inputs(1)[0], [])
    size = max(layout.nbytes for layout in loaded.layouts()[:-1])
    monkeypatch.setattr(host, "available_ram", lambda: host.MIN_RAM + (3 - len(loaded.masters)) * size)
    swap = swap_of(loaded, Source.STAGED)
    for _ in range(2):
        assert torch.equal(forward(loaded.blocks, inputs(1)[0], [swap]), wanted)
    assert len(loaded.masters) == 3
    swap.close()


def test_a_file_that_was_cut_off_since_is_named_and_nothing_stays(path: Path, cuda_runtime: Runtime) -> None:
    loaded, whole = from_file(path), path.read_bytes()
    rest = tensors_of(loaded)
    os.truncate(path, len(whole) - 2500)
    with pytest.raises(ValueError, match=r"toy\.safetensors ends at byte \d+, in the middle of .*Download it again"):
        run(loaded, Source.DISK)
    assert is_at_rest(loaded, rest) and cuda_runtime.registered == {}
    path.write_bytes(whole)
    run(loaded, Source.DISK)


def open_files() -> int:
    return len(psutil.Process().open_files())


class Fault:
    """Goes off at the n-th time that it is asked, wherever it was put: in a link, a reader, or around a block."""

    def __init__(self, kind: str, rng: random.Random):
        self.kind, self.left = kind, rng.randint(1, 12)

    def tick(self, error: BaseException) -> None:
        self.left -= 1
        if self.left == 0:
            raise error

    def before(self, i: int) -> None:
        if self.kind in BLOCK_ERRORS:
            self.tick(BLOCK_ERRORS[self.kind])

    def after(self, i: int) -> None:
        pass

    def link(self) -> LateLink:
        fault = self

        class Broken(LateLink):
            def load(self, *arguments: object) -> None:
                if fault.kind == "copy":
                    fault.tick(RuntimeError("CUDA error: an illegal memory access was encountered"))
                super().load(*arguments)

            def fence(self):
                if fault.kind == "fence":
                    fault.tick(RuntimeError("CUDA error: unspecified launch failure"))
                return super().fence()

        return Broken()

    def go_into(self, loaded: Loaded, path: Path, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        original = loaded.weights.fill

        def fill(*arguments: object) -> None:
            self.tick(OSError(5, "Input/output error"))
            original(*arguments)

        if self.kind == "reader":
            patch.setattr(loaded.weights, "fill", fill)
        elif self.kind == "truncated":
            os.truncate(path, rng.randint(0, path.stat().st_size - 1))


BLOCK_ERRORS = {"memory": torch.OutOfMemoryError("CUDA out of memory"), "cancel": KeyboardInterrupt()}
FAULTS = ("copy", "fence", "reader", "truncated", *BLOCK_ERRORS)


def test_random_faults_leave_nothing_behind(path: Path, cuda_runtime: Runtime) -> None:
    """Two hundred runs that break anywhere, then one that does not."""
    loaded, whole, rng = from_file(path), path.read_bytes(), random.Random(0)
    rest, broke = tensors_of(loaded), dict.fromkeys(FAULTS, 0)
    run(loaded, Source.DISK)
    before = threading.active_count(), open_files()
    for number in range(200):
        fault = Fault(FAULTS[number % len(FAULTS)], rng)
        while loaded.masters:
            loaded.masters.popitem()[1].unpin()
        with pytest.MonkeyPatch.context() as patch:
            fault.go_into(loaded, path, patch, rng)
            swap = swap_of(loaded, rng.choice(list(Source)), fault.link(), rng.randint(1, 3))
            try:
                for _ in range(3):
                    forward(loaded.blocks, inputs(1)[0], [swap, fault])
            except (RuntimeError, OSError, ValueError, KeyboardInterrupt):
                broke[fault.kind] += 1
            finally:
                swap.close()
        path.write_bytes(whole)
        assert is_at_rest(loaded, rest), (number, fault.kind)
        assert (threading.active_count(), open_files()) == before, (number, fault.kind)
        pinned = sum(master.is_pinned for master in loaded.masters.values())
        assert len(cuda_runtime.registered) == pinned, (number, fault.kind)
    assert all(count > 10 for count in broke.values()), broke
    wanted = forward(in_memory(path).blocks, inputs(1)[0], [])
    swap = swap_of(loaded, Source.PINNED)
    assert torch.equal(forward(loaded.blocks, inputs(1)[0], [swap]), wanted)
    swap.close()
    loaded.masters.clear()
    gc.collect()
    assert cuda_runtime.registered == {}


def test_a_buffer_has_its_pages_to_itself(cuda_runtime: Runtime) -> None:
    buffers = [HostBuffer(size) for size in (1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 17)]
    assert all(buffer.pin(CUDA) and buffer.pin(CUDA) for buffer in buffers)
    assert len(cuda_runtime.registered) == 5
    buffers[0].unpin()
    buffers[0].unpin()
    assert len(cuda_runtime.registered) == 4 and not buffers[0].is_pinned
    del buffers
    gc.collect()
    assert cuda_runtime.registered == {}


@pytest.mark.parametrize("kernel", ["another system", "without large pages"])
def test_a_buffer_needs_no_large_pages(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "another system":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 1 << 20, raising=False)  # an advice that no kernel knows
    buffer = HostBuffer(3 * PAGE + 17).bytes
    assert buffer.shape == (3 * PAGE + 17,) and buffer.data_ptr() % PAGE == 0
    assert int(buffer.fill_(3).sum()) == 3 * len(buffer)


def test_a_buffer_that_no_ram_has_is_an_error_as_pytorchs() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        HostBuffer(1 << 60)


def test_one_thread_at_most_and_none_where_all_is_pinned(path: Path, cuda_runtime: Runtime) -> None:
    loaded = from_file(path)
    run(loaded, Source.PINNED)
    swap = swap_of(loaded, Source.PINNED)
    forward(loaded.blocks, inputs(1)[0], [swap])
    assert swap.supply._thread is None
    swap.close()
    assert supply_module.NUM_STAGING == 2


def test_a_system_without_ram_reads_from_the_file_or_says_so(
    path: Path, cuda_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, wanted = from_file(path), forward(in_memory(path).blocks, inputs(1)[0], [])
    sizes = [layout.nbytes for layout in loaded.layouts()[:-1]]
    refused, original = {min(sizes)}, HostBuffer.__init__

    def init(self: HostBuffer, num_bytes: int) -> None:
        if num_bytes in refused:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        original(self, num_bytes)

    monkeypatch.setattr(HostBuffer, "__init__", init)
    swap = swap_of(loaded, Source.PINNED)
    assert torch.equal(forward(loaded.blocks, inputs(1)[0], [swap]), wanted)
    swap.close()
    assert set(loaded.masters) == {i for i, size in enumerate(sizes) if size not in refused} != set()
    refused.add(max(sizes))
    loaded.keep_only(())
    swap = swap_of(loaded, Source.DISK)
    with pytest.raises(ValueError, match=r"There are not the 0\.0 GB of RAM .* close other programs, or use a smaller"):
        forward(loaded.blocks, inputs(1)[0], [swap])
    swap.close()
