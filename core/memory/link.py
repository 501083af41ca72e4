"""What lies between RAM and a device: copies that run beside the compute, in the order that the ring needs."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .. import host
from .pinned import HostBuffer

PROBE, PROBE_SECONDS = 128 << 20, 0.3  # bytes of a copy, 5 ms on PCIe 4; how long copies are repeated
_speeds: dict[int, float] = {}  # by the device's number


class Link(Protocol):
    """A way for slabs into slots on a device, numbered from 0. Nothing here makes the CPU wait but fences and `close`.

    Copies are asked for by one thread or another, uses by the one that computes. With `wants_pinned` copies from
    memory that is not pinned would make the device, and who asks, wait.
    """

    wants_pinned: bool

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        """Copy a slab into a slot, once all that was asked to use the slot before is done."""

    def fence(self) -> Callable[[], None]:
        """Return what waits until all copies that were asked for by now are done."""

    def wait(self, slot: int) -> None:
        """Let the compute go on only when the slot's last copy is done."""

    def used(self, slot: int) -> None:
        """Say that all that uses what is in the slot now has been asked for."""

    def close(self) -> None:
        """Wait for copies under way, so that slots can be let go."""


class SynchronousLink:
    """A device without streams of its own: each copy is done when asked for."""

    wants_pinned = False

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        device[: host.numel()].copy_(host)

    def fence(self) -> Callable[[], None]:
        return lambda: None

    def wait(self, slot: int) -> None:
        pass

    def used(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class CudaLink:
    """A private copy stream, with an event on either side of each slot."""

    wants_pinned = True

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

    def fence(self) -> Callable[[], None]:
        event = torch.cuda.Event(blocking=True)  # who waits for it should not keep a core busy
        event.record(self.stream)
        return event.synchronize

    def wait(self, slot: int) -> None:
        self.compute.wait_event(self.ready[slot])

    def used(self, slot: int) -> None:
        self.done[slot].record(self.compute)

    def close(self) -> None:
        # The compute too: what it was given may still read the slots that are let go next.
        self.stream.synchronize()
        self.compute.synchronize()


def link_to(where: torch.device, num_slots: int) -> Link:
    """Return the way to a device."""
    return CudaLink(where, num_slots) if where.type == "cuda" else SynchronousLink()


def measured_speed(where: torch.device) -> float | None:
    """Return the bytes a second that cross from pinned memory to a CUDA device, measured once; None if it can't be now.

    A card at rest has its link at rest too, and takes a moment to wake it up: the fastest of some copies counts.
    """
    number = torch.cuda.current_device() if where.index is None else where.index
    if number not in _speeds:
        try:
            with torch.cuda.device(number):
                if speed := _speed(torch.device("cuda", number)):
                    _speeds[number] = speed
        except RuntimeError as error:
            if not host.is_out_of_memory(error):
                raise
    return _speeds.get(number)


def _speed(where: torch.device) -> float | None:
    source = HostBuffer(PROBE)
    try:
        if not source.pin(where):
            return None
        target = torch.empty(PROBE, dtype=torch.uint8, device=where)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        fastest, began = float("inf"), time.monotonic()
        while time.monotonic() - began < PROBE_SECONDS:
            start.record()
            target.copy_(source.bytes, non_blocking=True)
            end.record()
            end.synchronize()
            fastest = min(fastest, start.elapsed_time(end) / 1000)
        return PROBE / fastest
    finally:
        source.unpin()
