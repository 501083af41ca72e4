"""Weights on the device for the length of a run: all of them, or some streaming through."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import host
from .block_swap import BlockSwap
from .link import link_to
from .placement import place
from .slab import Loaded, Slab, nbytes

log = logging.getLogger(__name__)

MIN_RAM = 2 << 30  # bytes that stay for everything else

Module = TypeVar("Module", bound=nn.Module)
Slot = tuple[dict[str, Tensor | None], str, Tensor]  # where a tensor is registered


@contextmanager
def resident(module: Module, device: torch.device, working_bytes: int = 0) -> Iterator[Module]:
    """Give the module with its weights on the device; on the way out, also after an error, they are where they were.

    Room is asked for the weights and for `working_bytes` of what is computed with them. Weights are frozen: the copies
    on the device are let go, nothing is copied back. Raises ValueError if the weights alone don't fit.
    """
    away = _away(module, device)
    _make_room(away, device, working_bytes)
    needed = sum(tensor.nbytes for *_, tensor in away)
    if away and needed > (free := host.free_memory(device)):
        raise ValueError(
            f"The weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: use a smaller file "
            "of this model (fp8 takes half of bf16) or a smaller model, or close what else uses the card."
        )
    with _moved(away, device):
        yield module


@contextmanager
def streamed(loaded: Loaded, device: torch.device, working_bytes: int) -> Iterator[BlockSwap | None]:
    """Bring a model to the device, blocks that don't fit beside `working_bytes` by a hook that streams them.

    Without such blocks there is no hook. On the way out, also after an error, all weights are where they were. Raises
    ValueError if not even two blocks fit beside what is no block.
    """
    away = _away(loaded.module, device)
    if not away:
        yield None
        return
    _make_room(away, device, working_bytes)
    sizes = [nbytes(block) for block in loaded.blocks]
    inside = {id(table) for block in loaded.blocks for table, *_ in _away(block, device)}
    others = sum(tensor.nbytes for table, _, tensor in away if id(table) not in inside)
    plan = place(sizes, others, working_bytes, host.free_memory(device))
    slabs = {i: loaded.slab(i) for i in plan.streaming}
    if device.type == "cuda":
        _pin(slabs.values())
    with _moved(_away(loaded.module, device, [loaded.blocks[i] for i in plan.streaming]), device):
        if not slabs:
            yield None
            return
        slots = [torch.empty(plan.slot_bytes, dtype=torch.uint8, device=device) for _ in range(plan.num_slots)]
        swap = BlockSwap(slabs, slots, link_to(device, plan.num_slots))
        try:
            yield swap
        finally:
            swap.close()


@contextmanager
def _moved(away: Collection[Slot], device: torch.device) -> Iterator[None]:
    try:
        for table, name, tensor in away:
            copy = tensor.detach().to(device, non_blocking=True)
            table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        yield
    finally:
        for table, name, tensor in away:
            table[name] = tensor
        if away:
            host.empty_cache()


def _away(module: nn.Module, device: torch.device, streaming: Collection[nn.Module] = ()) -> list[Slot]:
    """Return the tensors that are not on the device yet, but for those of blocks that stream."""
    skipped = {id(part) for block in streaming for part in block.modules()}
    return [
        (table, name, tensor)
        for part in module.modules()
        if id(part) not in skipped
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None and not _is_on(tensor, device)
    ]


def _pin(slabs: Collection[Slab]) -> None:
    """Pin slabs until the system refuses, or has so little RAM left that it must be free to swap them out."""
    pinned = 0
    for slab in slabs:
        if host.available_ram() < MIN_RAM or not slab.pin():
            break
        pinned += 1
    if pinned < len(slabs):
        log.info("%d of %d streamed blocks are pinned; the others come in more slowly.", pinned, len(slabs))


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor is there already; a device without a number is whichever one of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _make_room(away: Collection[Slot], device: torch.device, working_bytes: int) -> None:
    if away:
        host.make_room(sum(tensor.nbytes for *_, tensor in away) + working_bytes, device)
