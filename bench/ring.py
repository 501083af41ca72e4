"""The ring of `core.memory.block_swap` itself in simulated time: no weights, no device, only when things happen."""

import torch
from torch import Tensor

from ..core.memory.block_swap import BlockSwap
from ..core.memory.timeline import Visit

WARM_UP, MEASURED = 3, 4  # walks: the first ones begin with an empty ring


class _Bare:
    """A layout of nothing."""

    def bind(self, buffer: Tensor) -> None:
        pass

    def release(self) -> None:
        pass


class SimulatedSupply:
    """A `Supply` over a link that brings one slab at a time, and a clock that blocks and waits turn on."""

    def __init__(self, visits: list[Visit]):
        self.visits, self.layouts = visits, [_Bare()] * len(visits)
        self.now = self.link_free = self.waited = 0.0
        self.arrived: dict[int, float] = {}
        self.left: dict[int, float] = {}

    def load(self, block: int, slot: int, buffer: Tensor) -> None:
        """Begin when the link is free and the compute has left the slot."""
        self.link_free = max(self.link_free, self.left.get(slot, 0.0)) + self.visits[block].coming
        self.arrived[slot] = self.link_free

    def wait(self, slot: int) -> None:
        """Turn the clock on to when the slot's slab is there."""
        self.waited += max(0.0, self.arrived[slot] - self.now)
        self.now = max(self.now, self.arrived[slot])

    def used(self, slot: int) -> None:
        """Note when the compute leaves the slot."""
        self.left[slot] = self.now


def simulated_seconds(visits: list[Visit], num_slots: int) -> float:
    """Return the seconds of a walk over the blocks in the rhythm that the ring settles in."""
    nothing = torch.empty(0)
    own = {i: nothing for i, visit in enumerate(visits) if not visit.streams}
    supply = SimulatedSupply(visits)
    swap = BlockSwap(own, [nothing] * num_slots, supply)
    swap.start()
    ends = []
    for _ in range(WARM_UP + MEASURED):
        for i, visit in enumerate(visits):
            swap.before(i)
            supply.now += visit.seconds
            swap.after(i)
        ends.append(supply.now)
    return (ends[-1] - ends[WARM_UP - 1]) / MEASURED
