"""A stand-in for CUDA's streams and events that knows what happens before what, and fails on a race.

Every thread and every stream has a vector clock. Work on a stream comes after all that its thread did before asking for
it; `record` and `wait_event` order streams, `synchronize` orders a thread behind them, futures order threads. Each read
of a buffer must come after its last write, each write after its last write and all reads since.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from wanqwen.core.memory import supply as supply_module
from wanqwen.core.memory.slab import Loaded

Clock = dict[object, int]


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


class Races:
    """The clocks of all threads and streams, and who used which buffer when."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clocks: dict[object, Clock] = defaultdict(dict)
        self.written: dict[int, tuple[object, int]] = {}
        self.read: dict[int, dict[object, int]] = defaultdict(dict)
        self.current = threading.local()
        self.compute = Stream(self, "compute")
        self.waits: list[str] = []  # who made the CPU wait for a stream

    def thread(self) -> object:
        return threading.get_ident()

    def order(self, later: object, earlier: Clock) -> None:
        with self.lock:
            clock = self.clocks[later]
            for actor, time in earlier.items():
                clock[actor] = max(clock.get(actor, 0), time)

    def act(self, actor: object, reads: tuple[Tensor, ...] = (), writes: tuple[Tensor, ...] = ()) -> None:
        """Do something that reads and writes buffers, as a thread or as a stream asked by this thread."""
        with self.lock:
            if actor != self.thread():
                self.order(actor, self.clocks[self.thread()])
            clock = self.clocks[actor]
            clock[actor] = now = clock.get(actor, 0) + 1
            for buffer in map(_key, reads):
                self._after(actor, [self.written[buffer]] if buffer in self.written else [], f"read of {buffer}")
                self.read[buffer][actor] = now
            for buffer in map(_key, writes):
                before = [*([self.written[buffer]] if buffer in self.written else []), *self.read[buffer].items()]
                self._after(actor, before, f"write of {buffer}")
                self.written[buffer], self.read[buffer] = (actor, now), {}

    def _after(self, actor: object, before: list[tuple[object, int]], what: str) -> None:
        clock = self.clocks[actor]
        for other, time in before:
            if clock.get(other, 0) < time:
                raise RaceError(f"{what} by {actor} is not ordered after {other} at {time}")


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, races: Races, name: str):
        self.races, self.name = races, name

    def wait_event(self, event: "Event") -> None:
        self.races.order(self, event.clock)

    def synchronize(self) -> None:
        self.races.waits.append(self.name)
        self.races.order(self.races.thread(), self.races.clocks[self])

    def __repr__(self) -> str:
        return self.name


class Event:
    """torch.cuda.Event."""

    def __init__(self, races: Races):
        self.races, self.clock = races, {}

    def record(self, stream: Stream) -> None:
        self.races.act(stream)
        with self.races.lock:
            self.clock = dict(self.races.clocks[stream])

    def synchronize(self) -> None:
        self.races.order(self.races.thread(), self.clock)


class Executor(ThreadPoolExecutor):
    """Threads whose tasks come after what asked for them, and before who waits for their results."""

    races: Races

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        with self.races.lock:
            asked = dict(self.races.clocks[self.races.thread()])
        done: Clock = {}

        def task() -> Any:
            self.races.order(self.races.thread(), asked)
            try:
                return call(*arguments)
            finally:
                with self.races.lock:
                    done.update(self.races.clocks[self.races.thread()])

        future = super().submit(task)
        original = future.result

        def result(timeout: float | None = None) -> Any:
            try:
                return original(timeout)
            finally:
                self.races.order(self.races.thread(), done)

        future.result = result
        return future


@contextmanager
def cuda() -> Iterator[Races]:
    """Put the stand-in where CUDA would be, and watch copies and the filling of slabs."""
    races = Races()
    original_copy, original_fill = Tensor.copy_, Loaded.fill

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before = getattr(races.current, "stream", None)
        races.current.stream = chosen
        yield
        races.current.stream = before

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if getattr(races.current, "stream", None):
            assert non_blocking
            races.act(races.current.stream, reads=(source,), writes=(self,))
        elif self.dtype == source.dtype == torch.uint8:  # a slab, from RAM to a staging buffer
            races.act(races.thread(), reads=(source,), writes=(self,))
        return original_copy(self, source)

    def fill(self: Loaded, layout: Any, buffer: Tensor, *more: Any) -> None:
        races.act(races.thread(), writes=(buffer,))
        original_fill(self, layout, buffer, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: races.compute)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(races, "copy"))
        patch.setattr(torch.cuda, "Event", lambda blocking=False: Event(races))
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(supply_module, "ThreadPoolExecutor", type("Watched", (Executor,), {"races": races}))
        patch.setattr(Tensor, "copy_", copy_)
        patch.setattr(Loaded, "fill", fill)
        yield races


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
