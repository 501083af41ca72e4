"""What of this machine serves the pack: which kernels work on it, how exactly, and how fast."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from . import kernels
from .core import host
from .core.ops.product_choice import OLDEST_CARDS, try_product
from .core.ops.proof import PROBE, Verdict, verdict
from .core.ops.trials import TRIALS, Tokens

# The shapes of published models: a chunk of Wan-14B's tokens; Qwen-Image has rows of 3072.
TOKENS = Tokens(rows=4096, heads=40, head_width=128)
ROUNDS = 20


def examine() -> Iterator[str]:
    """Give lines of text: the machine, what each kernel does and how it does here, products in 8 bits."""
    device = host.device()
    dtype = torch.bfloat16 if host.prefers_bfloat16(device) else torch.float32
    yield f"{platform.system()}, Python {platform.python_version()}, PyTorch {torch.__version__}, {_triton()}"
    yield f"Computes on {_card(device)}, in {str(dtype).removeprefix('torch.')}"
    yield ""
    yield f"{'kernel':<20}{'error':>7}{'speed':>8}  "
    reasons = set()
    for name, kernel in kernels.KERNELS.items():
        found = verdict(name, replace(TOKENS, rows=PROBE.rows), dtype, device)
        yield f"{name:<20}{_figures(name, found, dtype, device)}  {kernel.does}"
        if found.kernel is None:
            reasons.add(f"{name}: {found.reason}" if found.is_broken else found.reason)
    yield ""
    for product in OLDEST_CARDS:
        found = try_product(product, ((TOKENS.width, TOKENS.width),), device)
        works = f"work; rounding the rows costs {found.error:.1%}"
        yield f"matrix products in {product.name}: {found.refusal or works}"
    yield from (f"off: {reason}" for reason in sorted(reasons))
    yield "error: the largest difference from plain PyTorch, in steps of the dtype. speed: how many times as fast."


def _figures(name: str, found: Verdict, dtype: torch.dtype, device: torch.device) -> str:
    error = "-" if found.error is None else f"{found.error:.2f}"
    if found.kernel is None:
        return f"{error:>7}{'off':>8}"
    if device.type != "cuda":
        return f"{error:>7}{'-':>8}"
    return f"{error:>7}{speed(name, found.kernel, dtype, device):>8.1f}"


def speed(name: str, kernel: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> float:
    """Return how many times as fast as what it replaces a kernel is, on a card."""
    trial = TRIALS[name][0]
    arguments = trial.arguments(TOKENS, dtype, device)
    eager, fused = (seconds(lambda call=call: trial.run(call, arguments), device) for call in (trial.plain, kernel))
    return eager / fused


def seconds(call: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Return the seconds of a call, on the average over some after a first one."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / rounds


def _triton() -> str:
    version = kernels.triton_version()
    return "no Triton" if version is None else f"Triton {version}{', interpreted' * kernels.is_interpreted()}"


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
