"""Which attention a run takes: PyTorch's own, an installed package's, or ours in int8.

What is chosen is tried beside PyTorch's own before the run, on the lengths of the run, and where it does not work
PyTorch's own takes its place, which is said.
"""
# B batch, L query tokens, S key tokens, N heads, D head width

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import kernels
from .. import host
from ..types import AUTO_ATTENTION, SDPA_ATTENTION
from .attention import BACKEND, Attend, attention
from .proof import NO_MEMORY
from .trials import attention_arguments

log = logging.getLogger(__name__)

# With fewer keys, such as those of a prompt, there is little to save, and PyTorch's own attention is taken.
LEAST_KEYS = 1024
HEADS_TRIED = 2
USUAL = (1030, 1500)  # queries and keys of a trial where no run is known
HALVES = (torch.bfloat16, torch.float16)
WIDEST = 128  # numbers of a head


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """The lengths of one attention of a run, and whether its keys have a bias."""

    queries: int
    keys: int
    is_biased: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Faster:
    """An attention for many keys; all others, and biased ones if it can't take these, are left to PyTorch's own.

    `operator` is the call where torch.compile takes it, see `as_operator`.
    """

    name: str
    call: Attend
    takes_bias: bool
    least_keys: int
    operator: Attend | None = None

    def takes(self, one: Attended) -> bool:
        """Say whether this serves such an attention."""
        return one.keys >= self.least_keys and (self.takes_bias or not one.is_biased)

    def __call__(self, q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
        """Return what `attention` does, or nearly."""
        asked = Attended(queries=q_BLND.shape[1], keys=k_BSND.shape[1], is_biased=key_bias_BS is not None)
        if not self.takes(asked):
            return attention(q_BLND, k_BSND, v_BSND, key_bias_BS)
        call = self.operator if torch.compiler.is_compiling() and self.operator is not None else self.call
        return call(q_BLND, k_BSND, v_BSND, key_bias_BS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One row of the table: how an attention is had, and how far from PyTorch's own, of its size, it may be.

    `load` returns it, or None and why there is none.
    """

    does: str
    load: Callable[[torch.dtype, torch.device, int], tuple[Attend | None, str]]
    allowed: float
    takes_bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What came of trying an attention: how far it is from PyTorch's own, or why it can't be used."""

    refusal: str | None
    error: float = 0.0


def choose_attention(
    mode: str, width: int, dtype: torch.dtype, device: torch.device, asked: frozenset[Attended] = frozenset()
) -> tuple[Attend, list[str]]:
    """Return the attention of a run with heads of a width, and what there is to say of it.

    `asked` is what the run will ask for. With `auto` it is PyTorch's own: no other is as exact and faster.
    """
    if mode in (AUTO_ATTENTION, SDPA_ATTENTION):
        return attention, []
    backend = BACKENDS[mode]
    call, reason = backend.load(dtype, device, width)
    if call is None:
        return attention, [f"Attention is PyTorch's own in place of {backend.does}: {reason}."]
    faster = Faster(name=mode, call=call, takes_bias=backend.takes_bias, least_keys=LEAST_KEYS)
    served = sorted(filter(faster.takes, asked), key=lambda one: (one.keys, one.queries, one.is_biased))
    if asked and not served:
        return attention, [f"Attention is PyTorch's own: none in this run is one that {backend.does} serves."]
    worst = 0.0
    for one in served or [Attended(queries=USUAL[0], keys=USUAL[1])]:
        try:
            finding = try_attention(faster, backend.allowed, one, width, dtype, device)
        except RuntimeError as trouble:
            if not host.is_out_of_memory(trouble):
                raise
            finding = Finding(refusal=f"could not be tried: {NO_MEMORY}")
        if finding.refusal is not None:
            log.warning("Attention in %s %s: PyTorch's own takes its place.", backend.does, finding.refusal)
            return attention, [f"Attention is PyTorch's own in place of {backend.does}, which {finding.refusal}."]
        worst = max(worst, finding.error)
    return faster, [f"Attention to {LEAST_KEYS} tokens or more by {backend.does}: on random numbers {worst:.2%} from "
                    "PyTorch's own."]  # fmt: skip


@cache
def try_attention(
    faster: Faster, allowed: float, one: Attended, width: int, dtype: torch.dtype, device: torch.device
) -> Finding:
    """Try an attention beside PyTorch's own on some heads of the lengths of a run: once in the life of the process.

    Raises what PyTorch or a package does where memory runs out, which says nothing of the attention.
    """
    arguments = attention_arguments(one.queries, one.keys, HEADS_TRIED, width, dtype, device, is_biased=one.is_biased)
    with torch.inference_mode():
        wanted = attention(*arguments)
        try:
            found = faster.call(*arguments)
            if found.shape != wanted.shape or found.dtype != wanted.dtype:
                return Finding(refusal=f"gave {tuple(found.shape)} in {found.dtype} for {tuple(wanted.shape)}")
            error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
        except _trouble() as problem:
            if isinstance(problem, RuntimeError) and host.is_out_of_memory(problem):
                raise
            return Finding(refusal=f"failed with {type(problem).__name__}: {_first_line(problem)}")
    if not error <= allowed:  # NaN is not
        lengths = f"{one.queries} queries and {one.keys} keys"
        return Finding(refusal=f"differs by {error:.3g} of the result's size for {lengths}; {allowed} is allowed")
    return Finding(refusal=None, error=error)


def name_of(attend: Attend) -> str:
    """Return what users know an attention by."""
    return BACKENDS[attend.name].does if isinstance(attend, Faster) else BACKEND


@cache
def as_operator(name: str, call: Attend) -> Attend:
    """Return an attention as an operator of PyTorch's, which torch.compile takes as it is and does not look into."""

    def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        return call(q, k, v, key_bias).contiguous()

    operator = torch.library.custom_op(f"faster_attention::{name}", attend, mutates_args=())
    operator.register_fake(lambda q, k, v, key_bias=None: q.new_empty(q.shape))
    return operator


def _ours(dtype: torch.dtype, device: torch.device, width: int) -> tuple[Attend | None, str]:
    return kernels.find("attention_int8", torch.empty(1, width, dtype=dtype, device=device))


def _sage(dtype: torch.dtype, device: torch.device, width: int) -> tuple[Attend | None, str]:
    reason = _unfit(dtype, device, width) or _missing("sageattention")
    return (None, reason) if reason else (sage, "")


def _flash(dtype: torch.dtype, device: torch.device, width: int) -> tuple[Attend | None, str]:
    reason = _unfit(dtype, device, width) or _missing("flash_attn")
    return (None, reason) if reason else (flash, "")


def sage(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return attention by the package sageattention, which takes no bias; on the meta device its memory."""
    assert key_bias_BS is None
    k, v = (t.expand(len(q_BLND), -1, -1, -1) for t in (k_BSND, v_BSND))
    if q_BLND.is_meta:
        # q and k in 8 bits, and v in 16: what the package holds at the most of what it makes.
        held = [torch.empty_like(t, dtype=torch.int8) for t in (q_BLND, k)], torch.empty_like(v)
        result = torch.empty_like(q_BLND)
        del held
        return result
    return import_module("sageattention").sageattn(q_BLND, k, v, tensor_layout="NHD", is_causal=False)


def flash(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, key_bias_BS: Tensor | None = None) -> Tensor:
    """Return attention by the package flash_attn, which takes no bias; on the meta device its memory."""
    assert key_bias_BS is None
    k, v = (t.expand(len(q_BLND), -1, -1, -1) for t in (k_BSND, v_BSND))
    if q_BLND.is_meta:
        return attention(q_BLND, k, v)  # which takes as much
    return import_module("flash_attn").flash_attn_func(q_BLND, k, v)


def _missing(package: str) -> str | None:
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    try:
        import_module(package)
    except _trouble() as error:
        return f"the package {package} can't be imported: {type(error).__name__}: {_first_line(error)}"
    return None


def _unfit(dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    if _device_type(device) != "cuda":
        return f"runs on CUDA cards, not on {_device_type(device)}"
    if dtype not in HALVES:
        return f"takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return f"takes heads of at most {WIDEST} numbers, not {width}" if width > WIDEST else None


def _device_type(device: torch.device) -> str:
    return device.type


def _trouble() -> tuple[type[Exception], ...]:
    """Return what loading or calling code that is not ours may raise."""
    own = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
    triton = kernels.errors() if kernels.triton_version() is not None else ()
    return (*own, ImportError, OSError, *triton)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


# By the names that users choose. What rounds to 16 bits in other places differs by some parts in a thousand; 8 bits by
# about 1 % on the numbers of the trial, and what is ten times that is broken.
BACKENDS: Mapping[str, Backend] = {
    "flash": Backend(does="flash-attn", load=_flash, allowed=0.02),
    "sage": Backend(does="SageAttention", load=_sage, allowed=0.1),
    "int8": Backend(does="the int8 kernel", load=_ours, allowed=0.05, takes_bias=True),
}
