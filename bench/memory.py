"""What a call takes of this process's memory, for measuring on Linux."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SAMPLE_SECONDS = 0.005
T = TypeVar("T")


def watched(call: Callable[[], T]) -> tuple[T, float, float, int]:
    """Return a call's result, its seconds by the clock and of the processors, and its most bytes beyond those before.

    Pages of mapped files count.
    """
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, resident_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, worked = time.perf_counter(), time.process_time()
    try:
        result = call()
    finally:
        seconds, work = time.perf_counter() - started, time.process_time() - worked
        done.set()
        watcher.join()
    return result, seconds, work, peak


def resident_bytes() -> int:
    """Return the memory of this process, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
