"""A whole module on the device for the length of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import host

Module = TypeVar("Module", bound=nn.Module)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor is there already; a device without a number is whichever one of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


@contextmanager
def resident(module: Module, device: torch.device, working_bytes: int = 0) -> Iterator[Module]:
    """Give the module with its weights on the device; on the way out, also after an error, they are where they were.

    Room is asked for the weights and for `working_bytes` of what is computed with them. Weights are frozen: the copies
    on the device are let go, nothing is copied back. Raises ValueError if the weights alone don't fit.
    """
    slots = [
        (table, name, tensor)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None and not _is_on(tensor, device)
    ]
    if not slots:
        yield module
        return
    needed = sum(tensor.nbytes for *_, tensor in slots)
    host.make_room(needed + working_bytes, device)
    if needed > (free := host.free_memory(device)):
        raise ValueError(
            f"The weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: use a smaller file "
            "of this model (fp8 takes half of bf16) or a smaller model, or close what else uses the card."
        )
    try:
        for table, name, tensor in slots:
            copy = tensor.detach().to(device, non_blocking=True)
            table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        yield module
    finally:
        for table, name, tensor in slots:
            table[name] = tensor
        host.empty_cache()
