"""Weights on the device for the length of a run: all of them, or some streaming through."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import host
from .block_swap import BlockSwap
from .link import link_to
from .placement import GB, Plan, spread
from .report import where
from .slab import Loaded, Slot, is_there, tensors
from .supply import Source, Supply

log = logging.getLogger(__name__)

LEAST = 3  # blocks that leave the device when it is too full: two make the slots of a ring, so that one is gained

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def resident(module: Module, device: torch.device, working_bytes: int = 0) -> Iterator[Module]:
    """Give the module with its weights on the device; on the way out, also after an error, they are where they were.

    Room is asked for the weights and for `working_bytes` of what is computed with them. Weights are frozen: the copies
    on the device are let go, nothing is copied back. Raises ValueError if the weights alone don't fit.
    """
    away = [slot for slot in tensors(module) if not is_there(slot[2], device)]
    needed = sum(tensor.nbytes for *_, tensor in away)
    if away:
        host.make_room(needed + working_bytes, device)
    if needed > (free := host.free_memory(device)):
        raise ValueError(
            f"The weights take {needed / GB:.1f} GB and {free / GB:.1f} GB are free on {device}: use a smaller file "
            "of this model (fp8 takes half of bf16) or a smaller model, or close what else uses the card."
        )
    try:
        _bring(away, device)
        yield module
    finally:
        _restore(away)
        if away:
            host.empty_cache()


def computes_in_ram(device: torch.device) -> bool:
    """Say whether weights in RAM are where the device computes, so that nothing has to come anywhere."""
    return device.type == "cpu"


@contextmanager
def placed(loaded: Loaded, device: torch.device, plan: Callable[[], Plan]) -> Iterator["Residency"]:
    """Bring a model to the device as a plan says, which is asked for only if anything has to move.

    After the run, also after an error, nothing of it is on the device, and no thread, file or pinned staging is left.
    """
    residency = Residency(loaded, device)
    try:
        if residency.is_needed:
            residency.come(plan())
        else:
            loaded.in_ram()
        yield residency
    finally:
        residency.close()


class Residency:
    """Where a model's weights are during a run: on the device, or coming in block by block. A `BlockHook`."""

    def __init__(self, loaded: Loaded, device: torch.device):
        self.loaded, self.device = loaded, device
        self.is_needed = not computes_in_ram(device)
        self.plan = Plan(sources={})
        *self._blocks, self._others = loaded.layouts()
        self._has_others = False
        self._ring: BlockSwap | None = None

    def come(self, plan: Plan) -> None:
        """Take the memory that the plan names, and ask for the weights; other weights than the blocks' are there then.

        Everything is taken before the first block runs, and nothing after. Raises ValueError or OSError where the
        weights can't be read.
        """
        self.plan = plan
        self.loaded.keep_only([i for i, source in plan.sources.items() if source is not Source.DISK])
        host.empty_cache()  # what PyTorch keeps for itself is of other sizes
        if not self._has_others:
            in_ram = torch.empty(self._others.nbytes, dtype=torch.uint8)
            self.loaded.fill(self._others, in_ram)
            self._others.bind(in_ram.to(self.device))
            self._has_others = True
        own = {i: self._empty(layout.nbytes) for i, layout in enumerate(self._blocks) if i not in plan.streaming}
        slot = max((self._blocks[i].nbytes for i in plan.streaming), default=0)
        ring = [self._empty(slot) for _ in range(plan.num_slots)]
        link = link_to(self.device, len(ring) + len(own))
        supply = Supply(self.loaded, self._blocks, plan.sources, link, self.device)
        self._ring = BlockSwap(own, ring, supply)

    def give_way(self) -> bool:
        """After the device ran out of memory, make more blocks stream; False if that can't help any more."""
        total, streaming = len(self._blocks), len(self.plan.streaming)
        num_slots = max(2, self.plan.num_slots)
        if not self.is_needed or streaming == total or total <= num_slots:
            return False
        self._halt()
        host.empty_cache()
        more = min(total, streaming + max(LEAST, total // 8))
        kind = next(iter(self.plan.sources.values()), Source.PINNED)
        sources = {i: self.plan.sources.get(i, kind) for i in spread(total, more)}
        self.come(replace(self.plan, streaming=tuple(sources), num_slots=min(num_slots, more), sources=sources))
        return True

    def describe(self) -> str:
        """Say where the blocks are; nothing if all are where they always were."""
        return where(self.plan, len(self._blocks)) if self.is_needed else ""

    def before(self, i: int) -> None:
        """Make block i ready to run."""
        if self._ring:
            self._ring.before(i)

    def after(self, i: int) -> None:
        """Go on without block i."""
        if self._ring:
            self._ring.after(i)

    def close(self) -> None:
        """Let go of all that is on the device."""
        try:
            self._halt()
        finally:
            if self._has_others:
                self._others.release()
            if self.is_needed:
                host.empty_cache()

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _halt(self) -> None:
        ring, self._ring = self._ring, None
        if ring:
            ring.close()


def _bring(slots: Collection[Slot], device: torch.device) -> None:
    for table, name, tensor in slots:
        copy = tensor.detach().to(device, non_blocking=True)
        table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _restore(slots: Sequence[Slot]) -> None:
    for table, name, tensor in slots:
        table[name] = tensor
