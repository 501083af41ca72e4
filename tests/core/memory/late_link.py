"""A copy stream as unkind as the rules allow."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from wanqwen.core.memory.link import SynchronousLink


class LateLink(SynchronousLink):
    """The worst that a copy stream may do: a copy happens only when somebody waits for it, and spoils the slot before.

    Fails when a slot is filled that may still be read. What was in the host's buffer by the time of the copy is what
    comes over, so that a staging buffer that is filled again too early shows.
    """

    wants_pinned = True

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.in_use: set[int] = set()
        self.loads = 0
        self.slots: list[Tensor] = []
        self._lock = threading.RLock()

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        with self._lock:
            assert slot not in self.in_use, f"slot {slot} is filled while the compute may still read it"
            self._carry_out(slot)
            device.fill_(0xFF)  # NaN, whatever the dtype
            self.slots.append(device)
            self.pending[slot] = (device, host)
            self.loads += 1

    def fence(self) -> Callable[[], None]:
        with self._lock:
            asked = dict(self.pending)

        def wait() -> None:
            with self._lock:
                for slot, copy in asked.items():
                    if self.pending.get(slot) is copy:
                        self._carry_out(slot)

        return wait

    def wait(self, slot: int) -> None:
        with self._lock:
            self._carry_out(slot)
            self.in_use.add(slot)

    def used(self, slot: int) -> None:
        with self._lock:
            self.in_use.remove(slot)

    def spoil(self) -> None:
        """Do to the slots what others do to memory that was let go."""
        with torch.inference_mode():
            for slot in self.slots:
                slot.fill_(0xFF)

    def _carry_out(self, slot: int) -> None:
        if slot in self.pending:
            device, host = self.pending.pop(slot)
            with torch.inference_mode():
                device[: host.numel()].copy_(host)
