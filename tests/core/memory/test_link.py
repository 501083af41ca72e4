"""The order in which a CUDA link asks for copies, events and waits; the device is a stand-in that keeps a list."""

from contextlib import contextmanager

import pytest
import torch
from wanqwen.core.memory.link import CudaLink, SynchronousLink, link_to

CUDA = torch.device("cuda")


class Stream:
    def __init__(self, name: str, log: list[tuple]):
        self.name, self.log = name, log

    def wait_event(self, event: "Event") -> None:
        self.log.append((self.name, "wait", event))

    def synchronize(self) -> None:
        self.log.append((self.name, "synchronize"))


class Event:
    def __init__(self, blocking: bool = False):
        self.blocking = blocking

    def record(self, stream: Stream) -> None:
        stream.log.append((stream.name, "record", self))

    def synchronize(self) -> None:
        pass


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was asked of which stream, in order; a copy is asked of the stream that is current."""
    log, current = [], ["compute"]

    @contextmanager
    def stream(chosen: Stream):
        current[0] = chosen.name
        yield
        current[0] = "compute"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute", log))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copy", log))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    original = torch.Tensor.copy_

    def copy_(self, source, non_blocking=False):
        log.append((current[0], "copy", non_blocking))
        return original(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    return log


def test_a_copy_waits_for_the_last_use_and_the_compute_for_the_copy(log: list[tuple]) -> None:
    link = link_to(CUDA, 2)
    assert isinstance(link, CudaLink)
    assert log == [("compute", "record", done) for done in link.done]
    log.clear()
    device, host = torch.zeros(8, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)
    link.load(1, device, host)
    link.wait(1)
    link.used(1)
    assert link.wants_pinned
    fence = link.fence()
    link.close()
    assert fence.__self__ is log[-3][2] and fence.__name__ == "synchronize" and fence.__self__.blocking
    assert log == [
        ("copy", "wait", link.done[1]),
        ("copy", "copy", True),
        ("copy", "record", link.ready[1]),
        ("compute", "wait", link.ready[1]),
        ("compute", "record", link.done[1]),
        ("copy", "record", log[-3][2]),
        ("copy", "synchronize"),
        ("compute", "synchronize"),
    ]
    assert device.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_a_device_without_streams_copies_when_asked() -> None:
    link, device = link_to(torch.device("cpu"), 1), torch.zeros(4, dtype=torch.uint8)
    assert isinstance(link, SynchronousLink)
    link.load(0, device, torch.ones(3, dtype=torch.uint8))
    assert device.tolist() == [1, 1, 1, 0]
