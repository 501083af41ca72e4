"""Where slabs come from: pinned RAM, other RAM, or the file; the last two through pinned staging buffers."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum

import torch
from torch import Tensor

from .. import host
from .link import Link
from .pinned import HostBuffer
from .slab import Layout, Loaded

log = logging.getLogger(__name__)

MIN_RAM = 2 << 30  # bytes that stay for everything else
NUM_STAGING = 2  # buffers: one is filled while the other crosses


class Source(Enum):
    """Where a block's slab waits between two visits to the device; the fastest first, each falls to the next."""

    PINNED = "pinned"  # in registered RAM, kept for the next runs: crosses beside the compute with nobody waiting
    STAGED = "staged"  # in RAM that could not be registered, kept too: a thread copies it to a staging buffer first
    DISK = "disk"  # in its file, or what the system has cached of it: a thread reads it into a staging buffer


class _Stopped(Exception):
    """The run is over; nobody waits for this slab any more."""


class Supply:
    """Bring the slabs of `layouts` into slots, in the order asked for. `kinds` says where each waits; else on disk.

    What is pinned already crosses at once. Everything else is the work of one thread, which fills staging buffers and
    asks for their copies; slabs that are to be kept in RAM are made on their first way through. An error of that thread
    is raised by `wait`.
    """

    def __init__(
        self, loaded: Loaded, layouts: Sequence[Layout], kinds: Mapping[int, Source], link: Link, device: torch.device
    ):
        self.loaded, self.layouts, self.kinds, self.link, self.device = loaded, layouts, kinds, link, device
        self._asked: dict[int, Future[None]] = {}  # by slot
        self._thread: ThreadPoolExecutor | None = None
        self._over = threading.Event()
        self._staging: list[HostBuffer] = []
        self._busy: deque[tuple[HostBuffer, Callable[[], None]]] = deque()  # with what waits until it is free again
        self._may_pin = link.wants_pinned

    def load(self, block: int, slot: int, buffer: Tensor) -> None:
        """Bring a block's slab into a slot, which is this buffer on the device."""
        if former := self._asked.pop(slot, None):
            former.result()  # a slab that nobody waited for must not come after this one
        master = self.loaded.masters.get(block)
        if master is not None and (master.is_pinned or not self.link.wants_pinned):
            self.link.load(slot, buffer, master.bytes)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="slabs")
        self._asked[slot] = self._thread.submit(self._bring, block, slot, buffer)

    def wait(self, slot: int) -> None:
        """Let the compute go on only when the slot's slab is there. Raises what went wrong on its way.

        The CPU waits here until the copy has been asked for, which a slab from pinned memory always has.
        """
        if asked := self._asked.pop(slot, None):
            asked.result()
        self.link.wait(slot)

    def used(self, slot: int) -> None:
        """Say that all that uses what is in the slot now has been asked for."""
        self.link.used(slot)

    def close(self) -> None:
        """Stop, wait for what is under way, and let the staging buffers go."""
        self._over.set()
        try:
            if self._thread is not None:
                self._thread.shutdown(wait=True, cancel_futures=True)
        finally:
            self._thread, self._asked = None, {}
            try:
                self.link.close()
            finally:
                self._busy.clear()
                while self._staging:
                    self._staging.pop().unpin()

    def _bring(self, block: int, slot: int, buffer: Tensor) -> None:
        # Tensors made under inference mode may only be written under it, and modes are a thread's own.
        with torch.inference_mode():
            layout, master = self.layouts[block], self._master(block)
            if master is not None and (master.is_pinned or not self.link.wants_pinned):
                self.link.load(slot, buffer, master.bytes)
                return
            staging = self._next_staging()
            filled = staging.bytes[: layout.nbytes]
            try:
                if master is None:
                    self.loaded.fill(layout, filled, self._go_on)
                else:
                    filled.copy_(master.bytes)
                self.link.load(slot, buffer, filled)
            finally:
                self._busy.append((staging, self.link.fence()))

    def _master(self, block: int) -> HostBuffer | None:
        """Return the slab of a block that is kept in RAM, made now if it was not there, or None if it is not kept."""
        kind = self.kinds.get(block, Source.DISK)
        masters, layout = self.loaded.masters, self.layouts[block]
        if block not in masters and kind is not Source.DISK and host.available_ram() >= layout.nbytes + MIN_RAM:
            fresh = HostBuffer(layout.nbytes)
            self.loaded.fill(layout, fresh.bytes, self._go_on)
            masters[block] = fresh
        master = masters.get(block)
        if master is not None and not master.is_pinned and kind is Source.PINNED and self._may_pin:
            self._may_pin = master.pin(self.device)
            if not self._may_pin:
                log.info("The system gives no more pinned memory: further blocks pass through staging buffers.")
        return master

    def _next_staging(self) -> HostBuffer:
        """Return a staging buffer that no copy reads any more."""
        if len(self._staging) == NUM_STAGING and self._busy:
            buffer, wait = self._busy.popleft()
            wait()
            return buffer
        fresh = HostBuffer(max(layout.nbytes for layout in self.layouts))
        self._staging.append(fresh)
        if self.link.wants_pinned and not fresh.pin(self.device):
            log.warning("No memory could be pinned for staging: copies to %s make it wait.", self.device)
        return fresh

    def _go_on(self) -> None:
        if self._over.is_set():
            raise _Stopped
