"""The operations of blocks that have fused spellings, and which spelling a run takes.

The choice is made before a run and lives in it. Fused spellings round once where the eager ones do, and sum in another
order: a result is the same in every run with the same choice, but not the same bits as with the other.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from ..types import EXACT_KERNELS
from . import norm, rope, rows
from .attention import Attend, attention
from .products import Product
from .proof import PROBE, Verdict, verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """What blocks call: by the names of `kernels.KERNELS` what may be fused, then attention; by default eager.

    `products` are those that they take in 8 bits.
    """

    layer_norm: Callable[..., Tensor] = norm.layer_norm
    rms_norm: Callable[..., Tensor] = norm.rms_norm
    norm_rotate: Callable[..., None] = rope.norm_rotate
    add_to_rows: Callable[..., Tensor] = rows.add_to_rows
    add_norm: Callable[..., tuple[Tensor, Tensor]] = rows.add_norm
    attention: Attend = attention
    products: tuple[Product, ...] = ()


EXACT = Ops()
FUSED = tuple(field.name for field in fields(Ops) if field.name not in ("attention", "products"))


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
    tokens = replace(PROBE, heads=heads[0], head_width=heads[1])
    verdicts = {name: verdict(name, tokens, dtype, device) for name in FUSED}
    taken = {name: found.kernel for name, found in verdicts.items() if found.kernel is not None}
    return Ops(**taken), _said(verdicts)


def norm_silu_on(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return how `norm.norm_silu_into` is spelled on a device: as its kernel on CUDA where that works."""
    if device.type != "cuda":
        return norm.norm_silu_into
    found = verdict("norm_silu_into", PROBE, dtype, device)
    _log_once("fused kernel" if found.kernel else f"plain PyTorch: {found.reason}")
    return found.kernel or norm.norm_silu_into


@cache
def _log_once(spelling: str) -> None:
    log.info("The VAE's norms: %s", spelling)


def _said(verdicts: dict[str, Verdict]) -> list[str]:
    taken = [name for name, found in verdicts.items() if found.kernel is not None]
    lines = [f"Fused kernels: {', '.join(taken)}."] if taken else []
    reasons: dict[str, list[str]] = {}
    for name, found in verdicts.items():
        if found.kernel is None:
            reasons.setdefault(found.reason, []).append(name)
    names = {reason: "any kernel" if len(of) == len(verdicts) else ", ".join(of) for reason, of in reasons.items()}
    return lines + [f"Plain PyTorch in place of {names[reason]}: {reason}." for reason in reasons]
