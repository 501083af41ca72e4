"""Streamed weights give the very bits that resident ones give, and no slot is read too early or filled too early."""

import gc
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wanqwen.core.blocks import Run, run_blocks
from wanqwen.core.memory import resident as memory
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import SynchronousLink
from wanqwen.core.memory.placement import HEADROOM, place, spread
from wanqwen.core.memory.slab import ALIGNMENT, PAGE, Loaded, Slab, nbytes
from wanqwen.core.ops.linear import Linear

from .late_link import LateLink

WIDTH, DEPTH = 24, 7


class Block(nn.Module):
    """Weights of every kind that a slab must carry."""

    def __init__(self, generator: torch.Generator, fp8: bool):
        super().__init__()
        self.norm = nn.Parameter(torch.randn(WIDTH, generator=generator), requires_grad=False)
        self.linear = Linear(WIDTH, WIDTH)
        weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        if fp8:
            weight = weight.to(torch.float8_e4m3fn)
            self.linear.weight_scale = torch.rand(WIDTH, generator=generator)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.linear.bias = nn.Parameter(torch.randn(WIDTH, generator=generator).bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x * self.norm)


@pytest.fixture
def blocks() -> nn.ModuleList:
    generator = torch.Generator().manual_seed(0)
    return nn.ModuleList(Block(generator, fp8=i % 2 == 1) for i in range(DEPTH))


def forward(blocks: nn.ModuleList, x: Tensor, hooks: list[BlockSwap]) -> Tensor:
    return run_blocks(blocks, x, lambda i, block, state: block(state), run=Run(hooks={"blocks": hooks}))


def swap_of(blocks: nn.ModuleList, streaming: tuple[int, ...], num_slots: int, link: SynchronousLink) -> BlockSwap:
    slabs = {i: Slab(blocks[i]) for i in streaming}
    slots = [torch.empty(max(slab.nbytes for slab in slabs.values()), dtype=torch.uint8) for _ in range(num_slots)]
    return BlockSwap(slabs, slots, link)


@pytest.mark.parametrize("make_link", [LateLink, SynchronousLink])
def test_any_placement_gives_the_bits_of_resident_weights(
    blocks: nn.ModuleList, make_link: Callable[[], SynchronousLink]
) -> None:
    inputs = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = [forward(blocks, x, []) for x in inputs]
    rng = random.Random(0)
    for _ in range(30):
        streaming = tuple(sorted(rng.sample(range(DEPTH), rng.randint(1, DEPTH))))
        link = make_link()
        swap = swap_of(blocks, streaming, rng.randint(1, 4), link)
        assert all(torch.equal(forward(blocks, x, [swap]), out) for x, out in zip(inputs, wanted, strict=True))
        swap.close()
        assert all(torch.equal(forward(blocks, x, []), out) for x, out in zip(inputs, wanted, strict=True))


def test_each_block_crosses_once_a_forward_and_the_next_forward_begins_warm(blocks: nn.ModuleList) -> None:
    link = LateLink()
    swap = swap_of(blocks, (0, 2, 4, 6), 2, link)
    assert link.loads == 2
    for done in (1, 2, 3):
        forward(blocks, torch.ones(1, WIDTH), [swap])
        assert link.loads == 2 + 4 * done
    assert set(swap.holder) == {0, 2}


def test_blocks_that_all_have_a_slot_cross_once(blocks: nn.ModuleList) -> None:
    link = LateLink()
    swap = swap_of(blocks, (1, 5), 2, link)
    for _ in range(3):
        forward(blocks, torch.ones(1, WIDTH), [swap])
    assert link.loads == 2


def test_another_order_of_blocks_is_right_too(blocks: nn.ModuleList) -> None:
    swap, x = swap_of(blocks, tuple(range(DEPTH)), 2, LateLink()), torch.ones(1, WIDTH)
    for i in (3, 0, 6, 6, 2, 5):
        wanted = blocks[i](x)
        swap.before(i)
        assert torch.equal(blocks[i](x), wanted)
        swap.after(i)


def test_a_failed_block_leaves_all_weights_where_they_were(blocks: nn.ModuleList) -> None:
    x, wanted = torch.ones(1, WIDTH), forward(blocks, torch.ones(1, WIDTH), [])
    for failing in range(DEPTH):
        swap = swap_of(blocks, tuple(range(0, DEPTH, 2)), 2, LateLink())

        def call(i: int, block: nn.Module, state: Tensor, failing: int = failing) -> Tensor:
            if i == failing:
                raise KeyError(i)
            return block(state)

        with pytest.raises(KeyError):
            run_blocks(blocks, x, call, run=Run(hooks={"blocks": [swap]}))
        swap.close()
        assert torch.equal(forward(blocks, x, []), wanted)


def test_a_slab_holds_every_tensor_once_and_aligned(blocks: nn.ModuleList) -> None:
    before = {name: tensor.clone() for name, tensor in blocks[1].state_dict().items()}
    kinds = {name: type(tensor) for name, tensor in (*blocks[1].named_parameters(), *blocks[1].named_buffers())}
    expected = nbytes(blocks[1])
    slab = Slab(blocks[1])
    assert slab.nbytes == expected and all(piece.start % ALIGNMENT == 0 for piece in slab.pieces)
    after = dict((*blocks[1].named_parameters(), *blocks[1].named_buffers()))
    assert {name: type(tensor) for name, tensor in after.items()} == kinds
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor.float(), before[name].float())
        assert tensor.untyped_storage().data_ptr() == slab.host.untyped_storage().data_ptr()


def test_all_stays_where_all_fits_and_else_as_much_as_fits() -> None:
    block, others, working = 100 << 20, 300 << 20, 1 << 30
    whole = 10 * block + others + working + HEADROOM
    assert place([block] * 10, others, working, whole).streaming == ()
    for missing in range(1, 8 * block, 37 << 20):
        plan = place([block] * 10, others, working, whole - missing)
        taken = (10 - len(plan.streaming)) * block + plan.num_slots * block + others + working + HEADROOM
        assert whole - missing - block < taken <= whole - missing
    least = others + 2 * block
    assert len(place([block] * 10, others, working, least).streaming) == 10
    with pytest.raises(ValueError, match=r"0\.5 GB are needed .* and 0\.5 GB are free: use a smaller file"):
        place([block] * 10, others, working, least - 1)


def test_streaming_blocks_are_spread_evenly() -> None:
    for total in (1, 7, 40, 60):
        for chosen in range(1, total + 1):
            indices = spread(total, chosen)
            gaps = [b - a for a, b in zip(indices, (*indices[1:], indices[0] + total), strict=True)]
            assert len(set(indices)) == chosen and all(0 <= i < total for i in indices)
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("missing_blocks", [0, 5, 7])
def test_a_model_that_does_not_fit_runs_and_is_left_as_it_was(
    blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch, missing_blocks: int
) -> None:
    """The CPU stands for a device that nothing is on yet."""
    module = nn.ModuleDict({"blocks": blocks, "head": Linear(WIDTH, WIDTH)}).requires_grad_(False)
    x, wanted = torch.ones(2, WIDTH), forward(blocks, torch.ones(2, WIDTH), [])
    size, head = max(nbytes(block) for block in blocks), sum(p.nbytes for p in module["head"].parameters())
    free = head + HEADROOM + (DEPTH - missing_blocks) * size + (2 * size if missing_blocks else 0)
    monkeypatch.setattr(memory, "_is_on", lambda tensor, device: False)
    monkeypatch.setattr(memory.host, "free_memory", lambda device: free)
    loaded = Loaded(module, blocks)
    for _ in range(2):
        with memory.streamed(loaded, torch.device("cpu"), 0) as there:
            assert len(there.ring.slabs if there.ring else ()) == missing_blocks
            assert torch.equal(forward(blocks, x, [there]), wanted)
        assert torch.equal(forward(blocks, x, []), wanted)


class Runtime:
    """CUDA's, which remembers what is registered and has pages for so many."""

    def __init__(self, limit: int):
        self.limit, self.registered = limit, {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert pointer % PAGE == size % PAGE == 0
        assert all(pointer + size <= start or start + old <= pointer for start, old in self.registered.items())
        if len(self.registered) == self.limit:
            return 2
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.mark.parametrize("limit", [3, DEPTH])
def test_slabs_are_pinned_once_as_far_as_the_system_allows_and_let_go(
    blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    runtime = Runtime(limit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slabs = [Slab(block) for block in blocks]
    for _ in range(2):
        memory._pin(slabs)
        assert len(runtime.registered) == limit
    needed = sum(slab.nbytes for slab in slabs[:limit])
    assert needed <= sum(runtime.registered.values()) < needed + limit * PAGE
    monkeypatch.setattr(memory.host, "available_ram", lambda: 0)
    memory._pin([Slab(Linear(2, 2))])
    assert len(runtime.registered) == limit
    del slabs
    gc.collect()
    assert runtime.registered == {}
