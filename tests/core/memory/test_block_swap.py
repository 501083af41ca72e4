"""Blocks that come and go give the very bits that resident ones give, and no slot is read or filled too early."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from wanqwen.core.memory.block_swap import BlockSwap
from wanqwen.core.memory.link import SynchronousLink
from wanqwen.core.memory.slab import Loaded
from wanqwen.core.memory.supply import Source, Supply

from .late_link import LateLink
from .toy import DEPTH, KINDS, forward, from_file, in_memory, inputs, is_at_rest, tensors_of

pytestmark = pytest.mark.usefixtures("cuda_runtime")

CPU = torch.device("cpu")
EVERY = (Source.PINNED, Source.STAGED, Source.DISK)


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, path: Path) -> Loaded:
    return KINDS[request.param](path)


@pytest.fixture
def wanted(path: Path) -> list[Tensor]:
    """What the blocks make of the inputs with all weights where they are."""
    blocks = in_memory(path).module.blocks
    return [forward(blocks, x, []) for x in inputs()]


def swap_of(
    loaded: Loaded, streaming: tuple[int, ...], num_slots: int, link: SynchronousLink, kinds: dict[int, Source]
) -> BlockSwap:
    layouts = loaded.layouts()[:-1]
    own = {i: torch.empty(layouts[i].nbytes, dtype=torch.uint8) for i in range(DEPTH) if i not in streaming}
    size = max(layout.nbytes for layout in layouts)
    ring = [torch.empty(size, dtype=torch.uint8) for _ in range(num_slots)]
    swap = BlockSwap(own, ring, Supply(loaded, layouts, kinds, link, CPU))
    swap.start()
    return swap


@pytest.fixture
def swaps() -> Iterator[Callable[..., BlockSwap]]:
    """Make swaps that are closed at the end, so that a failed test does not hang on their threads."""
    made = []

    def make(*arguments: object) -> BlockSwap:
        made.append(swap_of(*arguments))
        return made[-1]

    yield make
    for swap in made:
        swap.close()


@pytest.mark.parametrize("make_link", [LateLink, SynchronousLink])
def test_any_placement_and_any_source_give_the_bits_of_resident_weights(
    loaded: Loaded, wanted: list[Tensor], make_link: Callable[[], SynchronousLink], swaps: Callable[..., BlockSwap]
) -> None:
    rest, rng = tensors_of(loaded), random.Random(0)
    for _ in range(30):
        streaming = tuple(sorted(rng.sample(range(DEPTH), rng.randint(0, DEPTH))))
        kinds = {i: rng.choice(EVERY) for i in streaming}
        link = make_link()
        swap = swaps(loaded, streaming, rng.randint(1, 4), link, kinds)
        assert all(torch.equal(forward(loaded.blocks, x, [swap]), w) for x, w in zip(inputs(), wanted, strict=True))
        swap.close()
        if isinstance(link, LateLink):
            link.spoil()
        assert is_at_rest(loaded, rest)
        loaded.masters.clear()


def test_each_block_crosses_once_a_forward_and_the_next_forward_begins_warm(
    path: Path, swaps: Callable[..., BlockSwap]
) -> None:
    loaded, link = in_memory(path), LateLink()
    swap = swaps(loaded, (0, 2, 4, 6), 2, link, {})
    for done in (1, 2, 3):
        forward(loaded.blocks, inputs(1)[0], [swap])
        swap.supply._thread.submit(lambda: None).result()  # what was asked for has been brought
        # The three that stay came once; of the others two are ahead, for the next forward.
        assert link.loads == 3 + 2 + 4 * done
    assert {block for block in swap.holder if block not in swap.staying} == {0, 2}


def test_blocks_that_all_have_a_slot_cross_once(path: Path, swaps: Callable[..., BlockSwap]) -> None:
    loaded, link = from_file(path), LateLink()
    swap = swaps(loaded, (1, 5), 2, link, {})
    for _ in range(3):
        forward(loaded.blocks, inputs(1)[0], [swap])
    assert link.loads == DEPTH


@pytest.mark.parametrize("streaming", [tuple(range(DEPTH)), (0, 1, 3, 6)])
@pytest.mark.parametrize("kind", EVERY)
def test_another_order_of_blocks_is_right_too(
    path: Path, streaming: tuple[int, ...], kind: Source, swaps: Callable[..., BlockSwap]
) -> None:
    loaded, x, blocks = from_file(path), inputs(1)[0], in_memory(path).blocks
    swap = swaps(loaded, streaming, 2, LateLink(), dict.fromkeys(streaming, kind))
    rng = random.Random(1)
    for i in [3, 0, 6, 6, 2, 5, *(rng.randrange(DEPTH) for _ in range(40))]:
        swap.before(i)
        assert torch.equal(loaded.blocks[i](x), blocks[i](x))
        swap.after(i)


def test_a_failed_block_leaves_all_weights_where_they_were(loaded: Loaded, swaps: Callable[..., BlockSwap]) -> None:
    rest = tensors_of(loaded)

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError

    for failing in range(DEPTH):
        swap = swaps(loaded, tuple(range(0, DEPTH, 2)), 2, LateLink(), {})
        blocks = [block if i != failing else Fails() for i, block in enumerate(loaded.blocks)]
        with pytest.raises(KeyError):
            forward(blocks, inputs(1)[0], [swap])
        swap.close()
        assert is_at_rest(loaded, rest)
