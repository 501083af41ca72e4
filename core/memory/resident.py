"""Weights on the device for the length of a run: all of them, or some streaming through."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import host
from .block_swap import BlockSwap
from .link import link_to
from .placement import HEADROOM, NUM_SLOTS, place, spread
from .slab import Loaded, Slot, nbytes, tensors

log = logging.getLogger(__name__)

LEAST = 3  # blocks that leave the device when it is too full: two make the slots of a ring, so that one is gained

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def resident(module: Module, device: torch.device, working_bytes: int = 0) -> Iterator[Module]:
    """Give the module with its weights on the device; on the way out, also after an error, they are where they were.

    Room is asked for the weights and for `working_bytes` of what is computed with them. Weights are frozen: the copies
    on the device are let go, nothing is copied back. Raises ValueError if the weights alone don't fit.
    """
    away = _away(module, device)
    needed = sum(tensor.nbytes for *_, tensor in away)
    if away:
        host.make_room(needed + working_bytes, device)
    if needed > (free := host.free_memory(device)):
        raise ValueError(
            f"The weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: use a smaller file "
            "of this model (fp8 takes half of bf16) or a smaller model, or close what else uses the card."
        )
    try:
        _bring(away, device)
        yield module
    finally:
        _restore(away)
        if away:
            host.empty_cache()


@contextmanager
def streamed(loaded: Loaded, device: torch.device, working_bytes: int) -> Iterator["Residency"]:
    """Bring a model to the device, in part as blocks that stream; after the run all weights are where they were.

    Raises ValueError if not even two blocks fit beside what is no block.
    """
    residency = Residency(loaded, device)
    try:
        residency.come(working_bytes)
        yield residency
    finally:
        residency.close()


class Residency:
    """Where a model's weights are during a run: on the device, or coming in block by block. A `BlockHook`."""

    def __init__(self, loaded: Loaded, device: torch.device):
        self.loaded, self.device = loaded, device
        self.others = _away(loaded.module, device, loaded.blocks)
        self.staying = {i: slots for i, block in enumerate(loaded.blocks) if (slots := _away(block, device))}
        self.is_needed = bool(self.others or self.staying)
        self.ring: BlockSwap | None = None

    def come(self, working_bytes: int) -> None:
        """Bring to the device what fits there beside `working_bytes`, and make the other blocks stream.

        Raises ValueError if not even two blocks fit beside what is no block.
        """
        if not self.is_needed:
            return
        sizes = [nbytes(block) for block in self.loaded.blocks]
        others = sum(tensor.nbytes for *_, tensor in self.others)
        host.make_room(sum(sizes) + others + working_bytes + HEADROOM, self.device)
        plan = place(sizes, others, working_bytes, host.free_memory(self.device))
        self._stream(plan.streaming, plan.num_slots)
        for slots in (self.others, *self.staying.values()):
            _bring(slots, self.device)

    def give_way(self) -> bool:
        """After the device ran out of memory, make more blocks stream; False if that can't help any more."""
        staying = sorted(self.staying)
        if not staying or len(self.loaded.blocks) <= NUM_SLOTS:
            return False
        host.make_room(sum(nbytes(block) for block in self.loaded.blocks), self.device)
        going = spread(len(staying), min(len(staying), max(LEAST, len(self.loaded.blocks) // 8)))
        already = tuple(self.ring.slabs) if self.ring else ()
        self._halt()
        for k in going:
            _restore(self.staying[staying[k]])
        host.empty_cache()
        streaming = sorted((*already, *(staying[k] for k in going)))
        self._stream(streaming, min(NUM_SLOTS, len(streaming)))
        return True

    def describe(self) -> str:
        """Say where the blocks are; nothing if all are where they always were."""
        if not self.is_needed:
            return ""
        total, away = len(self.loaded.blocks), len(self.ring.slabs) if self.ring else 0
        line = f"{total - away} of {total} blocks on the device"
        return f"{line}, {away} streaming in from RAM" if away else line

    def before(self, i: int) -> None:
        """Make block i ready to run."""
        if self.ring:
            self.ring.before(i)

    def after(self, i: int) -> None:
        """Go on without block i."""
        if self.ring:
            self.ring.after(i)

    def close(self) -> None:
        """Put everything back where it was."""
        try:
            self._halt()
        finally:
            for slots in (self.others, *self.staying.values()):
                _restore(slots)
            if self.is_needed:
                host.empty_cache()

    def _stream(self, streaming: Sequence[int], num_slots: int) -> None:
        """Make these blocks stream, which are not on the device."""
        if not streaming:
            return
        slabs = {}
        for i in streaming:
            self.staying.pop(i, None)  # the last hold on what the slab replaces
            slabs[i] = self.loaded.slab(i, self.device)
        if (pinned := sum(slab.is_pinned for slab in slabs.values())) < len(slabs) and self.device.type == "cuda":
            log.info("%d of %d streamed blocks are pinned; the others make the device wait.", pinned, len(slabs))
        size = max(slab.nbytes for slab in slabs.values())
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(num_slots)]
        self.ring = BlockSwap(slabs, slots, link_to(self.device, num_slots))

    def _halt(self) -> None:
        ring, self.ring = self.ring, None
        if ring:
            ring.close()


def _away(module: nn.Module, device: torch.device, but: Collection[nn.Module] = ()) -> list[Slot]:
    """Return where tensors are registered that are not on the device, those inside the modules `but` left out."""
    return [slot for slot in tensors(module, but) if not _is_on(slot[2], device)]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor is there already; a device without a number is whichever one of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _bring(slots: Collection[Slot], device: torch.device) -> None:
    for table, name, tensor in slots:
        copy = tensor.detach().to(device, non_blocking=True)
        table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _restore(slots: Collection[Slot]) -> None:
    for table, name, tensor in slots:
        table[name] = tensor
