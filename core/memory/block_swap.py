"""A ring of slots on the device: each block's weights come into one while the blocks before it compute."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .supply import Supply


class BlockSwap:
    """A `BlockHook` that has a block's weights on the device from before its call until after it, or for good.

    `own` are the slots of blocks that stay, by block; the others share `ring`. All slots are buffers on the device,
    made beforehand. Blocks are asked for in the order in which they are run, again and again, as far ahead as there are
    slots: past the end of a forward into the beginning of the next. A block that stays crosses once. Another order of
    calls costs time, not correctness.
    """

    def __init__(self, own: Mapping[int, Tensor], ring: Sequence[Tensor], supply: Supply):
        self.supply, self.num_blocks = supply, len(supply.layouts)
        self.slots = [*ring, *own.values()]
        self.staying = {block: len(ring) + k for k, block in enumerate(own)}
        self.holder: dict[int, int] = {}  # block -> the slot that holds its weights, or soon will
        self._coming: set[int] = set()  # blocks that have been asked for and not been used since
        self._bound: set[int] = set()
        self._next = 0  # the block to ask for next

    def start(self) -> None:
        """Ask for the first blocks, so that they are on their way before the first call."""
        self._ask()

    def before(self, i: int) -> None:
        """Make block i use its slot, from when its weights are there. Raises what went wrong on their way."""
        if i not in self.holder:  # not the block that was expected
            self._coming.clear()
            self._next = i
            self._ask()
        self._coming.discard(i)
        if i not in self._bound:
            self.supply.wait(self.holder[i])
            self.supply.layouts[i].bind(self.slots[self.holder[i]])
            self._bound.add(i)

    def after(self, i: int) -> None:
        """Let the slot of block i go to the next block that has none."""
        if i in self.staying:
            return
        self._release(i)
        self.supply.used(self.holder[i])
        self._ask()

    def close(self) -> None:
        """Make every block use what it did before, and wait for copies under way; also after an error."""
        for block in tuple(self._bound):
            self._release(block)
        self.supply.close()

    def _ask(self) -> None:
        """Ask for the blocks that come next, in the order of their use, as long as there are slots for them."""
        for _ in range(self.num_blocks):
            block = self._next
            if block not in self.holder:
                slot = self.staying.get(block)
                if slot is None and (slot := self._vacate(block)) is None:
                    return
                self.holder[block] = slot
                self._coming.add(block)
                self.supply.load(block, slot, self.slots[slot])
            self._next = (block + 1) % self.num_blocks

    def _vacate(self, coming: int) -> int | None:
        """Return a slot of the ring that is empty, or whose block has been used and is not needed before the coming."""
        holds = {slot: block for block, slot in self.holder.items()}
        ring = range(len(self.slots) - len(self.staying))
        if empty := [slot for slot in ring if slot not in holds]:
            return empty[0]
        spent = [block for block in holds.values() if block not in self._coming | self._bound | self.staying.keys()]
        if not spent:
            return None
        return self.holder.pop(max(spent, key=lambda block: (block - coming) % self.num_blocks))

    def _release(self, block: int) -> None:
        self.supply.layouts[block].release()
        self._bound.discard(block)
