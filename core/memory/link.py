"""What lies between RAM and a device: copies that run beside the compute, in the order that the ring needs."""

from typing import Protocol

import torch
from torch import Tensor


class Link(Protocol):
    """A way for slabs into the slots of a ring, numbered from 0. Nothing here ever makes the CPU wait but `close`."""

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        """Copy a slab into a slot, once all that was asked to use the slot before is done."""

    def wait(self, slot: int) -> None:
        """Let the compute go on only when the slot's last copy is done."""

    def used(self, slot: int) -> None:
        """Say that all that uses what is in the slot now has been asked for."""

    def close(self) -> None:
        """Wait for copies under way, so that slots can be let go."""


class SynchronousLink:
    """A device without streams of its own: each copy is done when asked for."""

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        device[: host.numel()].copy_(host)

    def wait(self, slot: int) -> None:
        pass

    def used(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class CudaLink:
    """A private copy stream, with an event on either side of each slot.

    The copies overlap the compute only from pinned memory; from other memory CUDA makes the CPU wait for each.
    """

    def __init__(self, where: torch.device, num_slots: int):
        self.compute, self.stream = torch.cuda.current_stream(where), torch.cuda.Stream(where)
        self.ready = [torch.cuda.Event() for _ in range(num_slots)]
        self.done = [torch.cuda.Event() for _ in range(num_slots)]
        # The memory of a slot may have been something else's a moment ago, which the compute stream still reads.
        for event in self.done:
            event.record(self.compute)

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        self.stream.wait_event(self.done[slot])
        with torch.cuda.stream(self.stream):
            device[: host.numel()].copy_(host, non_blocking=True)
            self.ready[slot].record(self.stream)

    def wait(self, slot: int) -> None:
        self.compute.wait_event(self.ready[slot])

    def used(self, slot: int) -> None:
        self.done[slot].record(self.compute)

    def close(self) -> None:
        self.stream.synchronize()


def link_to(where: torch.device, num_slots: int) -> Link:
    """Return the way to a device."""
    return CudaLink(where, num_slots) if where.type == "cuda" else SynchronousLink()
