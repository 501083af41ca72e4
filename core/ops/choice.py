"""The operations of blocks that have fused spellings, and which spelling a run takes.

The choice is made before a run and lives in it. Fused spellings round once where the eager ones do, and sum in another
order: a result is the same in every run with the same choice, but not the same bits as with the other.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ..types import EXACT_KERNELS
from . import norm, rope, rows
from .trials import TRIALS, Tokens, deviation

log = logging.getLogger(__name__)

PROBE_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """What blocks call, by the names of `kernels.KERNELS`; as it is made, all of it is eager."""

    layer_norm: Callable[..., Tensor] = norm.layer_norm
    rms_norm: Callable[..., Tensor] = norm.rms_norm
    norm_rotate: Callable[..., None] = rope.norm_rotate
    add_to_rows: Callable[..., Tensor] = rows.add_to_rows
    add_norm: Callable[..., tuple[Tensor, Tensor]] = rows.add_norm


EXACT = Ops()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A kernel that has proven itself, or None and why; `is_broken` if it should have worked and did not."""

    kernel: Callable[..., Any] | None
    reason: str
    is_broken: bool = False
    error: float | None = None


@cache
def verdict(name: str, tokens: Tokens, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Try a kernel beside its eager twin, on a few rows of a model's shape: once in the life of the process."""
    worst = 0.0
    for trial in TRIALS[name]:
        arguments = trial.arguments(tokens, dtype, device)
        found, reason = kernels.find(name, *trial.tensors(arguments))
        if found is None:
            return Verdict(kernel=None, reason=reason)
        wanted = trial.run(trial.eager, arguments)
        try:
            results = trial.run(found, trial.arguments(tokens, dtype, device))
            error = max(deviation(*pair) for pair in zip(results, wanted, strict=True))
        except kernels.errors() as trouble:
            first = (str(trouble).strip() or "no message").splitlines()[0]
            return Verdict(kernel=None, reason=f"failed with {type(trouble).__name__}: {first}", is_broken=True)
        if not error <= trial.allowed:  # NaN is not
            reason = f"differs by {error:.3g} from plain PyTorch, where {trial.allowed:.3g} is allowed"
            return Verdict(kernel=None, reason=reason, is_broken=True, error=error)
        worst = max(worst, error)
    return Verdict(kernel=found, reason=reason, error=worst)


def choose(mode: str, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Ops, list[str]]:
    """Return the operations of a run, and what there is to say of them.

    `heads` are the number of a model's heads and the width of each. With `auto` all kernels are taken that work here,
    on CUDA; elsewhere, and with `exact`, the run has the bits of plain PyTorch.
    """
    if device.type != "cuda":
        return EXACT, []
    if mode == EXACT_KERNELS:
        return EXACT, ["Fused kernels are off: the result has the bits of plain PyTorch."]
    return proven(heads, dtype, device)


def proven(heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Ops, list[str]]:
    """Return all operations that have a working kernel as that kernel, and what there is to say of them."""
    tokens = Tokens(rows=PROBE_ROWS, heads=heads[0], head_width=heads[1])
    verdicts = {field.name: verdict(field.name, tokens, dtype, device) for field in fields(Ops)}
    taken = {name: found.kernel for name, found in verdicts.items() if found.kernel is not None}
    for name, found in verdicts.items():
        if found.is_broken:
            log.warning("Kernel %s %s. Plain PyTorch takes its place.", name, found.reason)
    return Ops(**taken), _said(verdicts)


def _said(verdicts: dict[str, Verdict]) -> list[str]:
    taken = [name for name, found in verdicts.items() if found.kernel is not None]
    lines = [f"Fused kernels: {', '.join(taken)}."] if taken else []
    reasons: dict[str, list[str]] = {}
    for name, found in verdicts.items():
        if found.kernel is None:
            reasons.setdefault(found.reason, []).append(name)
    names = {reason: "any kernel" if len(of) == len(verdicts) else ", ".join(of) for reason, of in reasons.items()}
    return lines + [f"Plain PyTorch in place of {names[reason]}: {reason}." for reason in reasons]
