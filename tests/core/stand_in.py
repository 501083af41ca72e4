"""The CPU as a device that weights have to come to, with a copy stream as unkind as the rules allow."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from wanqwen.core import host, text
from wanqwen.core.memory import resident
from wanqwen.core.memory.placement import Plan
from wanqwen.core.text import Part
from wanqwen.core.types import Checkpoint
from wanqwen.core.weights import assemble
from wanqwen.core.weights.ranges import Range, read_ranges
from wanqwen.core.weights.tensors import read_tensors

from .memory.late_link import LateLink

PLENTY = 1 << 40


@dataclass
class StandIn:
    """A device with `free` bytes; for how many it was `asked`, and the links and plans that were made for it."""

    free: int = PLENTY
    asked: list[int] = field(default_factory=list)
    links: list[LateLink] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def spoil(self) -> None:
        """Do to all memory of the device what others do to what was let go."""
        for link in self.links:
            link.spoil()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Make the CPU a device for encoders; needs the fixture `cuda_runtime`."""
    device, make_plan = StandIn(), text.make_plan

    def link_to(where: torch.device, slots: int) -> LateLink:
        device.links.append(LateLink())
        return device.links[-1]

    def planned(*given: object) -> Plan:
        device.plans.append(make_plan(*given))
        return device.plans[-1]

    monkeypatch.setattr(resident, "computes_in_ram", lambda where: False)
    monkeypatch.setattr(resident, "link_to", link_to)
    monkeypatch.setattr(text, "make_plan", planned)
    monkeypatch.setattr(host, "make_room", lambda nbytes, where: device.asked.append(nbytes))
    monkeypatch.setattr(host, "free_memory", lambda where: device.free)
    return device


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return where the name of every tensor is noted that is read from a file, in whichever way."""
    names: list[str] = []

    def read(checkpoint: Checkpoint, asked: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        asked = list(asked)
        names.extend(asked)
        return read_tensors(checkpoint, asked)

    def read_into(ranges: Iterable[Range], *more: object) -> None:
        ranges = list(ranges)
        names.extend(one.name for one in ranges)
        read_ranges(ranges, *more)

    for module in (assemble, text):
        monkeypatch.setattr(module, "read_tensors", read)
    monkeypatch.setattr(assemble, "read_ranges", read_into)
    return names


def limits(part: Part, work_bytes: int) -> dict[int, tuple[int, int]]:
    """Return limits from all that a part takes down to one slot, with the blocks that stream then and their slots."""
    *blocks, others = (layout.nbytes for layout in part.loaded.layouts())
    slot, total = max(blocks), len(blocks)
    least, whole = others + work_bytes, others + work_bytes + sum(blocks)
    return {
        whole: (0, 0),
        whole - 1: (min(total, 3), 2),  # two blocks' slots make room for what one of three leaves
        least + 2 * slot: (total, 2),
        least + 2 * slot - 1: (total, 1),
        least + slot: (total, 1),
    }


def rest(part: Part) -> dict[str, tuple[int, bool]]:
    """Return which tensors a part's module holds, and whether they are nowhere but in the file."""
    module = part.loaded.module
    return {name: (id(t), t.is_meta) for name, t in (*module.named_parameters(), *module.named_buffers())}


def nothing_is_left(part: Part) -> bool:
    """Say whether no hook and no thread of a run is there any more."""
    hooks = [[*b._forward_hooks, *b._forward_pre_hooks] for b in part.loaded.module.modules()]
    return not any(hooks) and not any(thread.name.startswith("slabs") for thread in threading.enumerate())
