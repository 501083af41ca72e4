"""How fast a run goes: measured without what it waits for, and against what it should take."""

import time

import pytest
import torch
from wanqwen.core import pace as module
from wanqwen.core.pace import NEARLY_NOTHING, Pace, Stopwatch

CPU = torch.device("cpu")
FULL, ROOMY = NEARLY_NOTHING - 1, NEARLY_NOTHING


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that tests set."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def steps(pace: Pace, clock: list[float], *seconds: float) -> float:
    for one in seconds:
        clock[0] += one
        last = pace.step()
    return last


def test_the_mean_visit_is_read_once(clock: list[float]) -> None:
    watch = Stopwatch(CPU)
    for i, seconds in enumerate((1.0, 2.0, 3.0)):
        clock[0] += 100  # what the block waits for
        watch.before(i)
        clock[0] += seconds
        watch.after(i)
    assert watch.read() == 2.0
    watch.before(0)
    watch.after(0)
    assert watch.read() is None


def test_events_are_read_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing
            made.append(self)

        def record(self, stream: torch.device) -> None:
            assert stream == device

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (made.index(end) - made.index(self))

    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: where)
    watch = Stopwatch(device)
    watch.before(0)
    watch.after(0)
    assert watch.read() == 1.0 and len(made) == 2
    watch.before(1)
    watch.after(1)
    assert len(made) == 2


@pytest.mark.parametrize("planned", [None, 10.0])
def test_a_step_that_takes_too_long_on_a_full_card_was_swapped(clock: list[float], planned: float | None) -> None:
    pace = Pace(planned)
    # The first step brings the weights, and is never judged.
    assert not pace.is_swapped(steps(pace, clock, 500.0), FULL)
    assert not pace.is_swapped(steps(pace, clock, 10.0), FULL)
    assert not pace.is_swapped(steps(pace, clock, 19.9), FULL)
    slow = steps(pace, clock, 20.1)
    assert pace.is_swapped(slow, FULL) and not pace.is_swapped(slow, ROOMY)


def test_all_steps_may_be_slow_where_a_plan_says_what_they_should_take(clock: list[float]) -> None:
    pace = Pace(10.0)
    slow = steps(pace, clock, 50.0, 50.0)
    assert pace.is_swapped(slow, FULL)
    assert module.SLOWER == 2.0
