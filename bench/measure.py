"""Paired timings and measured peaks, on the CPU and on CUDA."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..core.blocks import Run
from ..core.ops.choice import choose
from ..core.types import AUTO_KERNELS

HEAD_WIDTH = 128  # of published models


@dataclass(frozen=True, slots=True)
class Figure:
    """Median and least seconds of one contestant, and the most bytes it had at once besides what was there before."""

    median_seconds: float
    least_seconds: float
    peak_bytes: int


@contextmanager
def capped(nbytes: float | None) -> Iterator[None]:
    """Let PyTorch take no more than so many bytes of a CUDA device, if there is one and any are named."""
    if nbytes is None or not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def compare(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Figure]:
    """Run the contestants in turn, `rounds` times after one warm-up, so that a slow minute hits all of them.

    On a machine that others use too, `time.process_time` as the clock tells what one thread took of it.
    """
    peaks = {name: peak_bytes(call, device) for name, call in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            _synchronise(device)
            started = clock()
            call()
            _synchronise(device)
            seconds[name].append(clock() - started)
    return {name: Figure(statistics.median(times), min(times), peaks[name]) for name, times in seconds.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes PyTorch's allocator held at once during `call`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def table(title: str, figures: Mapping[str, Figure], ours: str = "ours") -> str:
    """Return the figures as text, each as a ratio of ours to it."""
    own = figures[ours]
    lines = [title]
    for name, figure in figures.items():
        line = f"  {name:<14}{figure.median_seconds:9.3f} s  (least {figure.least_seconds:.3f})"
        line += f"  peak {figure.peak_bytes / 1e6:9.1f} MB"
        if name != ours:
            seconds, peak = own.median_seconds / figure.median_seconds, own.peak_bytes / max(1, figure.peak_bytes)
            line += f"   ours/{name}: time {seconds:.2f}, peak {peak:.2f}"
        lines.append(line)
    return "\n".join(lines)


def run_on(device: torch.device, dtype: torch.dtype, heads: int) -> Run:
    """Return a run with the fused kernels that work on a device, as a sampler takes them, and say which these are."""
    ops, said = choose(AUTO_KERNELS, (heads, HEAD_WIDTH), dtype, device)
    sys.stdout.writelines(f"{line}\n" for line in said)
    return Run(dtype=dtype, ops=ops)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
