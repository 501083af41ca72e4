"""Streamed weights give the very bits that resident ones give, and no slot is read too early or filled too early."""

import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wanqwen.core.blocks import Run, run_blocks
from wanqwen.core.memory import resident as memory
from wanqwen.core.memory import slab as slab_module
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import SynchronousLink
from wanqwen.core.memory.placement import HEADROOM, Placement, place, spread
from wanqwen.core.memory.slab import ALIGNMENT, MIN_RAM, PAGE, Loaded, Slab, nbytes
from wanqwen.core.ops.linear import Linear

from .late_link import LateLink

WIDTH, DEPTH = 24, 7
CUDA = torch.device("cuda")


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


def with_head(blocks: nn.ModuleList) -> nn.ModuleDict:
    """Return a model of which the blocks are a part."""
    head = Linear(WIDTH, WIDTH).requires_grad_(False)
    for parameter in head.parameters():
        parameter.fill_(0.5)
    return nn.ModuleDict({"blocks": blocks, "head": head})


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
        link = LateLink()
        swap = swap_of(blocks, tuple(range(0, DEPTH, 2)), 2, link)

        def call(i: int, block: nn.Module, state: Tensor, failing: int = failing) -> Tensor:
            if i == failing:
                raise KeyError(i)
            return block(state)

        with pytest.raises(KeyError):
            run_blocks(blocks, x, call, run=Run(hooks={"blocks": [swap]}))
        swap.close()
        link.spoil()
        assert torch.equal(forward(blocks, x, []), wanted)


def test_a_slab_holds_every_tensor_once_and_aligned(blocks: nn.ModuleList) -> None:
    before = {name: tensor.clone() for name, tensor in blocks[1].state_dict().items()}
    kinds = {name: type(tensor) for name, tensor in (*blocks[1].named_parameters(), *blocks[1].named_buffers())}
    expected = nbytes(blocks[1])
    slab = Slab(blocks[1])
    assert ALIGNMENT == 256 and slab.nbytes == expected
    assert all(piece.start % ALIGNMENT == 0 for piece in slab.pieces)
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


def test_streaming_blocks_are_spread_evenly_and_fewer_are_among_more() -> None:
    for total in (1, 2, 7, 40, 60):
        before: set[int] = set()
        for chosen in range(1, total + 1):
            indices = spread(total, chosen)
            gaps = [b - a for a, b in zip(indices, (*indices[1:], indices[0] + total), strict=True)]
            assert len(set(indices)) == chosen and all(0 <= i < total for i in indices)
            assert max(gaps) <= 2 * min(gaps) + 1 and before < set(indices)
            before = set(indices)
    assert spread(40, 0) == ()


@pytest.mark.parametrize("missing_blocks", [0, 5, 7])
def test_a_model_that_does_not_fit_runs_and_is_left_as_it_was(
    blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch, missing_blocks: int
) -> None:
    """The CPU stands for a device that nothing is on yet."""
    module = with_head(blocks)
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
    """CUDA's, which remembers what is registered and has pages for so many. A refusal is left behind as an error."""

    def __init__(self, limit: int):
        self.limit, self.registered, self.refusals, self.error = limit, {}, 0, False

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert pointer % PAGE == size % PAGE == 0
        assert all(pointer + size <= start or start + old <= pointer for start, old in self.registered.items())
        if len(self.registered) == self.limit:
            self.refusals, self.error = self.refusals + 1, True
            return 2
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0

    def clear(self, device: torch.device) -> None:
        self.error = False


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(DEPTH)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(slab_module, "_clear_error", runtime.clear)
    return runtime


@pytest.mark.parametrize("limit", [3, DEPTH])
def test_slabs_are_pinned_once_as_far_as_the_system_allows_and_let_go(
    blocks: nn.ModuleList, runtime: Runtime, limit: int
) -> None:
    runtime.limit = limit
    loaded = Loaded(blocks, blocks)
    for _ in range(2):
        slabs = [loaded.slab(i, CUDA) for i in range(DEPTH)]
        assert len(runtime.registered) == sum(slab.is_pinned for slab in slabs) == limit
    assert runtime.refusals == (limit < DEPTH) and not runtime.error
    needed = sum(slab.nbytes for slab in slabs[:limit])
    assert needed <= sum(runtime.registered.values()) < needed + limit * PAGE
    del slabs, loaded
    gc.collect()
    assert runtime.registered == {}


def test_nothing_is_pinned_where_ram_is_short_or_the_device_is_another(
    blocks: nn.ModuleList, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded(blocks, blocks)
    assert not loaded.slab(0, torch.device("cpu")).is_pinned
    monkeypatch.setattr(memory.host, "available_ram", lambda: MIN_RAM - 1)
    assert not loaded.slab(0, CUDA).is_pinned
    with pytest.raises(ValueError, match=r"does not fit on cuda, and 2\.1 GB of RAM are free to stream it from"):
        loaded.slab(1, CUDA)
    assert runtime.registered == {}


def test_no_original_weight_outlives_its_slab(blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or RAM would have to hold the streamed share twice."""
    monkeypatch.setattr(memory, "_is_on", lambda tensor, device: False)
    monkeypatch.setattr(memory.host, "free_memory", lambda device: 2 * max(nbytes(block) for block in blocks))
    originals = [weakref.ref(block.linear.weight) for block in blocks]
    alive, original = [], Slab.__init__

    def init(self: Slab, block: nn.Module) -> None:
        alive.append(sum(ref() is not None for ref in originals))
        original(self, block)

    monkeypatch.setattr(Slab, "__init__", init)
    with memory.streamed(Loaded(blocks, blocks), torch.device("cpu"), 0):
        assert alive == list(range(DEPTH, 0, -1))


def test_weights_go_to_the_device_and_come_back_from_wherever_they_are(
    blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is one without memory, so that nothing there can be taken for what lies in RAM."""
    module = with_head(blocks)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pointers = [block.norm.data_ptr() for block in blocks]
    monkeypatch.setattr(memory.host, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory, "place", lambda *_: Placement(streaming=(2,), num_slots=1))

    def there() -> list[int]:
        return [i for i, block in enumerate(blocks) if block.linear.weight.is_meta and block.linear.bias.is_meta]

    with pytest.raises(KeyError), memory.streamed(Loaded(module, blocks), torch.device("meta"), 0) as residency:
        assert there() == [0, 1, 3, 4, 5, 6] and module["head"].weight.is_meta
        assert residency.describe() == "6 of 7 blocks on the device, 1 streaming in from RAM"
        residency.before(2)
        assert 2 in there()
        residency.after(2)
        assert residency.give_way() and there() == sorted(residency.staying) and len(there()) == 3
        stayed = there()
        residency.before(2)
        raise KeyError
    after = module.state_dict()
    assert not there() and all(torch.equal(after[name].float(), old.float()) for name, old in before.items())
    assert all(blocks[i].norm.data_ptr() == pointers[i] for i in stayed)


def test_a_device_that_fails_leaves_the_weights_where_they_were(
    blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(SynchronousLink):
        def close(self) -> None:
            raise RuntimeError("an earlier error of the device")

    monkeypatch.setattr(memory, "place", lambda *_: Placement(streaming=(1, 4), num_slots=2))
    monkeypatch.setattr(memory, "link_to", lambda *_: Broken())
    with (
        pytest.raises(RuntimeError, match="earlier error"),
        memory.streamed(Loaded(blocks, blocks), torch.device("meta"), 0) as residency,
    ):
        residency.before(4)
    assert not any(tensor.is_meta for tensor in blocks.state_dict().values())


def test_two_blocks_can_not_give_way(monkeypatch: pytest.MonkeyPatch, blocks: nn.ModuleList) -> None:
    monkeypatch.setattr(memory.host, "free_memory", lambda device: 1 << 40)
    with memory.streamed(Loaded(blocks[:2], blocks[:2]), torch.device("meta"), 0) as residency:
        assert not residency.give_way()
