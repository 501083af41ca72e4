"""Faster spellings of functions whose plain PyTorch version lives in core. Ask `find`; never import a kernel file.

A kernel takes the arguments of its eager function. Its file imports Triton on top, so it is imported on first use only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel: `refuse(*tensors)` says why it can't serve these tensors, or returns None; `load()` imports it."""

    refuse: Callable[..., str | None]
    load: Callable[[], Callable[..., Tensor]]


KERNELS: dict[str, Kernel] = {}


def find(name: str, *tensors: Tensor) -> tuple[Callable[..., Tensor] | None, str]:
    """Return the kernel of that name for these tensors and a word on it, or None and the reason why there is none."""
    kernel = KERNELS.get(name)
    if kernel is None:
        return None, f"no kernel of the name {name!r} is built in"
    reason = kernel.refuse(*tensors)
    return (None, reason) if reason else (kernel.load(), f"kernel {name}")
