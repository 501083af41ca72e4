"""A whole module on the device for the length of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .. import host

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def resident(module: Module, device: torch.device) -> Iterator[Module]:
    """Give the module with its weights on the device; on the way out, also after an error, they are where they were.

    Weights are frozen: the copies on the device are let go, nothing is copied back.
    """
    slots = [
        (table, name, tensor)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None and tensor.device != device
    ]
    if not slots:
        yield module
        return
    host.make_room(sum(tensor.nbytes for *_, tensor in slots), device)
    try:
        for table, name, tensor in slots:
            copy = tensor.detach().to(device, non_blocking=True)
            table[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        yield module
    finally:
        for table, name, tensor in slots:
            table[name] = tensor
        host.empty_cache()
