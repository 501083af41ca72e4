"""Denoisers without a model."""

from collections.abc import Callable

from torch import Tensor
from wanqwen.core.types import Denoiser


def denoiser(*velocities: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """Return the denoiser of conditionings whose velocities are known functions of (x, timestep)."""
    return lambda x, timestep_B, which: [velocities[k](x, timestep_B) for k in which]
