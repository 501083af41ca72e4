"""A copy stream as unkind as the rules allow."""

import torch
from torch import Tensor
from wanqwen.core.memory.link import SynchronousLink


class LateLink(SynchronousLink):
    """The worst that a copy stream may do: a copy happens only when it is waited for, and spoils the slot before.

    Fails when a slot is filled that may still be read.
    """

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.in_use: set[int] = set()
        self.loads = 0
        self.slots: list[Tensor] = []

    def load(self, slot: int, device: Tensor, host: Tensor) -> None:
        assert slot not in self.in_use, f"slot {slot} is filled while the compute may still read it"
        device.fill_(0xFF)  # NaN, whatever the dtype
        self.slots.append(device)
        self.pending[slot] = (device, host)
        self.loads += 1

    def wait(self, slot: int) -> None:
        if slot in self.pending:
            device, host = self.pending.pop(slot)
            device[: host.numel()].copy_(host)
        self.in_use.add(slot)

    def used(self, slot: int) -> None:
        self.in_use.remove(slot)

    def spoil(self) -> None:
        """Do to the slots what others do to memory that was let go."""
        with torch.inference_mode():
            for slot in self.slots:
                slot.fill_(0xFF)
