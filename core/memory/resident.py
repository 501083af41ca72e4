"""Weights on the device for the length of a run: all of them, or some streaming through."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import host
from . import kept
from .block_swap import BlockSwap
from .link import link_to
from .pinned import HostBuffer
from .placement import GB, NUM_SLOTS, Plan
from .report import where
from .slab import Loaded, Slot, is_there, tensors
from .supply import Source, Supply

log = logging.getLogger(__name__)

LEAST = 3  # blocks that leave the device when it is too full: two make the slots of a ring, so that one is gained

Module = TypeVar("Module", bound=nn.Module)
Planner = Callable[[int], Plan]  # at least how many blocks are to stream -> the plan


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
def placed(loaded: Loaded, device: torch.device, planner: Planner) -> Iterator["Residency"]:
    """Bring a model to the device as a plan says, which is asked for only if anything has to move.

    After the run, also after an error, nothing of it is on the device, and no thread or pinned staging is left.
    """
    residency = Residency(loaded, device, planner)
    loaded.is_in_use = True
    try:
        if residency.is_needed:
            residency.come()
        else:
            loaded.in_ram()
        yield residency
    finally:
        try:
            residency.close()
        finally:
            loaded.is_in_use = False
            kept.show()


class Residency:
    """Where a model's weights are during a run: on the device, or coming in block by block. A `BlockHook`."""

    def __init__(self, loaded: Loaded, device: torch.device, planner: Planner):
        self.loaded, self.device, self.planner = loaded, device, planner
        self.is_needed = not computes_in_ram(device)
        self.plan = Plan(sources={})
        *self._blocks, self._others = loaded.layouts()
        self._has_others = False
        self._ring: BlockSwap | None = None

    def come(self, at_least: int = 0) -> None:
        """Plan, take the memory that the plan names, and ask for the weights; those outside of blocks are there then.

        At least so many blocks stream; more where the device has not even the memory of the plan. Everything is taken
        before the first block runs, and nothing after. Raises what the planner does, ValueError or OSError where the
        weights can't be read, and OutOfMemoryError where nothing helps.
        """
        while not self._take(self.planner(at_least)):
            if self._is_exhausted:
                raise torch.OutOfMemoryError(
                    f"{self.device} is out of memory, even with all blocks streaming: make the picture smaller, take "
                    "fewer frames or a smaller batch, or close what else uses the card."
                )
            at_least = self._more
            log.warning("%s has not the memory of the plan: at least %d blocks will stream", self.device, at_least)

    def give_way(self) -> bool:
        """After the device ran out of memory, make more blocks stream; False if that can't help any more."""
        if not self.is_needed or self._is_exhausted:
            return False
        at_least = self._more
        self._halt()
        self.come(at_least)
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

    @property
    def _is_exhausted(self) -> bool:
        total = len(self._blocks)
        return len(self.plan.streaming) == total or total <= NUM_SLOTS

    @property
    def _more(self) -> int:
        total = len(self._blocks)
        return min(total, len(self.plan.streaming) + max(LEAST, total // 8))

    def _take(self, plan: Plan) -> bool:
        """Carry out a plan; False if the device has not the memory, and then nothing of it is there."""
        self.plan = plan
        self.loaded.keep_only([i for i, source in plan.sources.items() if source is not Source.DISK])
        host.empty_cache()  # what PyTorch keeps for itself is of other sizes
        try:
            self._fill()
            return True
        except RuntimeError as error:
            if not host.is_out_of_memory(error):
                raise
        # Outside of the except clause, where all that was taken is gone.
        self._halt()
        host.empty_cache()
        return False

    def _fill(self) -> None:
        if not self._has_others:
            in_ram = HostBuffer(self._others.nbytes).bytes
            self.loaded.fill(self._others, in_ram, host.check_interrupt)
            self._others.bind(in_ram.to(self.device))
            self._has_others = True
        plan = self.plan
        own = {i: self._empty(layout.nbytes) for i, layout in enumerate(self._blocks) if i not in plan.streaming}
        slot = max((self._blocks[i].nbytes for i in plan.streaming), default=0)
        ring = [self._empty(slot) for _ in range(plan.num_slots)]
        link = link_to(self.device, len(ring) + len(own))
        supply = Supply(self.loaded, self._blocks, plan.sources, link, self.device)
        self._ring = BlockSwap(own, ring, supply)
        self._ring.start()

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
