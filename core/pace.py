"""How fast a run goes: what a block computes for, and whether the driver has begun to swap the card's memory."""

import time

import torch

NEARLY_NOTHING = 128 << 20  # bytes: a card with less than that free is full
SLOWER = 2.0  # times what a step took or should take: what a driver that swaps costs, and more


class Stopwatch:
    """A `BlockHook` that measures how long blocks compute, without what they wait for, until it is read."""

    def __init__(self, device: torch.device):
        self.device, self._spans, self._start, self._is_over = device, [], None, False

    def before(self, i: int) -> None:
        """Begin with block i, whose weights are there."""
        if not self._is_over:
            self._start = self._now()

    def after(self, i: int) -> None:
        """End with block i."""
        if not self._is_over:
            self._spans.append((self._start, self._now()))

    def read(self) -> float | None:
        """Return the mean seconds of a visit to a block, and stop measuring; None if there was none.

        The device must be done with all of them.
        """
        spans, self._spans, self._is_over = self._spans, [], True
        if not spans:
            return None
        if self.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in spans) / 1000 / len(spans)
        return sum(end - start for start, end in spans) / len(spans)

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Pace:
    """The times of a run's steps, against each other and against what was planned."""

    def __init__(self, planned_seconds: float | None):
        self.planned, self.fastest, self.steps = planned_seconds, None, 0
        self._last = time.perf_counter()

    def step(self) -> float:
        """End a step and return its seconds."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.steps += 1
        if self.steps > 1:  # the first brings the weights too
            self.fastest = seconds if self.fastest is None else min(seconds, self.fastest)
        return seconds

    def is_swapped(self, seconds: float, free_bytes: int) -> bool:
        """Say whether a step took so much longer than it should, on a full card, that its memory must be elsewhere.

        Drivers, those of Windows above all, move a part of a full card's memory to RAM instead of failing.
        """
        expected = self.fastest if self.planned is None else self.planned
        is_slow = expected is not None and self.steps > 1 and seconds > SLOWER * expected
        return is_slow and free_bytes < NEARLY_NOTHING
