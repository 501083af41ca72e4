"""Where slabs come from: pinned RAM, other RAM, or the file; the last two through pinned staging buffers."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, nullcontext
from enum import Enum

import torch
from torch import Tensor

from .. import host
from .kept import release_idle
from .link import Link
from .pinned import HostBuffer
from .slab import Layout, Loaded

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.25  # between two looks whether the user stopped the run
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
        self._readers = ThreadPoolExecutor(host.READ_HELPERS, thread_name_prefix="slabs-reader")
        self._over = threading.Event()
        self._staging: list[HostBuffer] = []
        self._busy: deque[tuple[HostBuffer, Callable[[], None]]] = deque()  # with what waits until it is free again
        self._may_pin = link.wants_pinned

    def load(self, block: int, slot: int, buffer: Tensor) -> None:
        """Bring a block's slab into a slot, which is this buffer on the device."""
        if slot in self._asked:
            self._await(slot)  # a slab that nobody waited for must not come after this one
        master = self.loaded.masters.get(block)
        if master is not None and (master.is_pinned or not self.link.wants_pinned):
            self.link.load(slot, buffer, master.bytes)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="slabs")
        self._asked[slot] = self._thread.submit(self._bring, block, slot, buffer)

    def wait(self, slot: int) -> None:
        """Let the compute go on only when the slot's slab is there. Raises what went wrong on its way.

        The CPU waits here until the copy has been asked for, which a slab from pinned memory always has; meanwhile the
        user may stop the run.
        """
        if slot in self._asked:
            self._await(slot)
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
                self._readers.shutdown()
                self.link.close()
            finally:
                self._busy.clear()
                while self._staging:
                    self._staging.pop().unpin()

    def _await(self, slot: int) -> None:
        """Wait until the thread has done what it was asked for a slot."""
        asked = self._asked.pop(slot)
        try:
            while True:
                try:
                    return asked.result(timeout=PATIENCE_SECONDS)
                except FutureTimeout:
                    if asked.done():  # just now, or the error is the work's own
                        return asked.result()
                    host.check_interrupt()
        finally:
            del asked  # its error holds this frame, and with it all slots

    def _bring(self, block: int, slot: int, buffer: Tensor) -> None:
        # Tensors made under inference mode may only be written under it; modes and the current device are a thread's.
        with torch.inference_mode(), _current(self.device):
            layout, master = self.layouts[block], self._master(block)
            if master is not None and (master.is_pinned or not self.link.wants_pinned):
                self.link.load(slot, buffer, master.bytes)
                return
            staging = self._next_staging()
            filled = staging.bytes[: layout.nbytes]
            try:
                if master is None:
                    self.loaded.fill(layout, filled, self._go_on, self._readers)
                else:
                    filled.copy_(master.bytes)
                self.link.load(slot, buffer, filled)
            finally:
                self._busy.append((staging, self.link.fence()))

    def _master(self, block: int) -> HostBuffer | None:
        """Return the slab of a block that is kept in RAM, made now if it was not there, or None if it is not kept."""
        kind = self.kinds.get(block, Source.DISK)
        masters, layout = self.loaded.masters, self.layouts[block]
        if block not in masters and kind is not Source.DISK and (fresh := self._buffer(layout.nbytes)):
            self.loaded.fill(layout, fresh.bytes, self._go_on, self._readers)
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
        size = max(layout.nbytes for layout in self.layouts)
        try:
            fresh = HostBuffer(size)
        except RuntimeError as error:
            raise ValueError(
                f"There are not the {size / 1e9:.1f} GB of RAM that a block of the model passes through on its way to "
                "the card: close other programs, or use a smaller file of this model (fp8 takes half of bf16)."
            ) from error
        self._staging.append(fresh)
        if self.link.wants_pinned and not fresh.pin(self.device):
            log.warning("No memory could be pinned for staging: copies to %s make it wait.", self.device)
        return fresh

    def _buffer(self, num_bytes: int) -> HostBuffer | None:
        """Return RAM to keep, if need be what idle models kept; None where there is none to spare."""
        if (short := num_bytes + host.MIN_RAM - host.available_ram()) > 0:
            release_idle(self.loaded, short)
        if host.available_ram() < num_bytes + host.MIN_RAM:
            return None
        try:
            return HostBuffer(num_bytes)
        except RuntimeError:  # PyTorch's way to say that the system gives no more
            log.info("The system gives no more RAM: further blocks are read from their file each time.")
            return None

    def _go_on(self) -> None:
        if self._over.is_set():
            raise _Stopped


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, for which CUDA registers memory."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()
