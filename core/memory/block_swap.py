"""Blocks that stream: each comes into a slot of a ring on the device while the blocks before it compute."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .link import Link
from .slab import Slab


class BlockSwap:
    """A `BlockHook` that brings a block's weights in before its call and lets another's in after it.

    `slabs` are those of the blocks that stream, by index; other blocks are left alone. `slots` are buffers on the
    device, each as large as the largest slab. The blocks are expected in their order, again and again: while one
    computes, those that come next are copied, past the end of a forward into the beginning of the next. Another order
    costs time, not correctness.
    """

    def __init__(self, slabs: Mapping[int, Slab], slots: Sequence[Tensor], link: Link):
        self.slabs, self.slots, self.link = dict(sorted(slabs.items())), slots, link
        self.order = list(self.slabs)
        self.holder: dict[int, int] = {}  # block -> the slot that holds its weights, or soon will
        for slot, block in zip(range(len(slots)), self.order, strict=False):
            self._load(block, slot)

    def before(self, i: int) -> None:
        """Make block i use its slot, from when its weights are there."""
        if i not in self.slabs:
            return
        if i not in self.holder:  # not the block that was expected
            self._load(i, next(iter(self.holder.values())))
        slot = self.holder[i]
        self.link.wait(slot)
        self.slabs[i].bind(self.slots[slot])

    def after(self, i: int) -> None:
        """Give the slot of block i to the next block that has none."""
        if i not in self.slabs:
            return
        slot = self.holder[i]
        self.slabs[i].bind(self.slabs[i].host)
        self.link.used(slot)
        at = self.order.index(i)
        following = [*self.order[at + 1 :], *self.order[:at]]
        coming = next((block for block in following if block not in self.holder), None)
        if coming is not None:
            self._load(coming, slot)

    def close(self) -> None:
        """Point every block at its own weights again, and wait for copies under way; also after an error."""
        for slab in self.slabs.values():
            slab.bind(slab.host)
        self.link.close()

    def _load(self, block: int, slot: int) -> None:
        for former in [known for known, where in self.holder.items() if where == slot]:
            del self.holder[former]
        self.link.load(slot, self.slots[slot], self.slabs[block].host)
        self.holder[block] = slot
