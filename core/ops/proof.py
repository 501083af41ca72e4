"""Kernels beside their eager twins: none is used that has not passed its trials on this very machine."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ... import kernels
from .. import host
from .trials import TRIALS, Tokens, deviation

log = logging.getLogger(__name__)

PROBE = Tokens(rows=64, heads=24, head_width=128)  # where the shape of a model makes no difference
NO_MEMORY = "the card had no memory left to try it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A kernel that has proven itself, or None and why; `is_broken` if it should have worked and did not."""

    kernel: Callable[..., Any] | None
    reason: str
    is_broken: bool = False
    error: float | None = None


def spelling(operation: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """Return an operation in plain PyTorch as it is, or on CUDA as the kernel of its name, where that works.

    For what needs no shape of a model. Compilers get what they can look into.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return operation
    return verdict(operation.__name__, PROBE, dtype, device).kernel or operation


def verdict(name: str, tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Try a kernel beside its eager twin, on a few rows of a model's shape: once in the life of the process.

    Memory that is missing says nothing of the kernel: it is tried again when it is asked for again.
    """
    try:
        return tried(name, tokens, dtype, device)
    except RuntimeError as trouble:
        if not host.is_out_of_memory(trouble):
            raise
    log.warning("Kernel %s: %s. Plain PyTorch takes its place for now.", name, NO_MEMORY)
    return Verdict(kernel=None, reason=NO_MEMORY)


@cache
def tried(name: str, tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Return what `verdict` does, always the same. Raises what PyTorch or Triton does where memory runs out."""
    worst = 0.0
    for trial in TRIALS[name]:
        arguments = trial.arguments(tokens, dtype, device)
        wanted = trial.run(trial.eager, arguments)
        try:
            found, reason = kernels.find(name, *trial.tensors(arguments))
            if found is None:
                return Verdict(kernel=None, reason=reason)
            results = trial.run(found, trial.arguments(tokens, dtype, device))
            errors = [deviation(*pair) for pair in zip(results, wanted, strict=True)]
        except kernels.errors() as trouble:
            if isinstance(trouble, RuntimeError) and host.is_out_of_memory(trouble):
                raise
            first = (str(trouble).strip() or "no message").splitlines()[0]
            return _broken(name, f"failed with {type(trouble).__name__}: {first}")
        for error in errors:
            if not error <= trial.allowed:  # NaN is not
                reason = f"differs by {error:.3g} from plain PyTorch, where {trial.allowed:.3g} is allowed"
                return _broken(name, reason, error)
            worst = max(worst, error)
    return Verdict(kernel=found, reason=reason, error=worst)


def _broken(name: str, reason: str, error: float | None = None) -> Verdict:
    log.warning("Kernel %s %s. Plain PyTorch takes its place.", name, reason)
    return Verdict(kernel=None, reason=reason, is_broken=True, error=error)
