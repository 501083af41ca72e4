"""Numbers that are made on the CPU for a device."""

import torch
from torch import Tensor


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device.

    As a rule nobody waits for what a CUDA device has still to do: a little that is not pinned is copied at once.
    """
    return numbers.to(device, non_blocking=device.type == "cuda")
