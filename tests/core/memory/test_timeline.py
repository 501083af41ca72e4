"""The timeline of the ring, against closed forms where there are any."""

import pytest
from wanqwen.core.memory.placement import spread
from wanqwen.core.memory.timeline import Visit, step_seconds


def visits(total: int, streaming: tuple[int, ...], seconds: float, coming: float) -> list[Visit]:
    return [Visit(seconds=seconds, streams=i in streaming, coming=coming * (i in streaming)) for i in range(total)]


@pytest.mark.parametrize("total", [40, 60])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.5, 3.0])
def test_an_even_ring_of_two_takes_the_longer_of_computing_and_copying(total: int, ratio: float) -> None:
    """T = max(N t_c, S t_x), but for the rounding of where blocks are."""
    for count in range(4, total + 1, 4):
        found = step_seconds(visits(total, spread(total, count), 1.0, ratio), 2)
        wanted = max(total, count * ratio)
        assert wanted - 1e-9 <= found <= 1.06 * wanted, count


def test_a_suffix_is_slower_than_an_even_layout() -> None:
    """The picture model of 60 blocks: 14.9 ms of computing and 27.7 ms of copying a block."""
    even = step_seconds(visits(60, spread(60, 32), 14.9, 27.7), 2)
    suffix = step_seconds(visits(60, tuple(range(28, 60)), 14.9, 27.7), 2)
    assert even < 0.75 * suffix
    assert step_seconds(visits(60, spread(60, 60), 14.9, 27.7), 2) == pytest.approx(60 * 27.7)


def test_one_slot_overlaps_nothing() -> None:
    assert step_seconds(visits(10, tuple(range(10)), 1.0, 2.0), 1) == pytest.approx(30)


def test_blocks_that_all_have_a_slot_cost_nothing() -> None:
    assert step_seconds(visits(10, (2, 5), 1.0, 50.0), 2) == 10


def test_slow_blocks_among_fast_ones_are_waited_for() -> None:
    slow = [Visit(seconds=1.0, streams=True, coming=10.0 if i == 3 else 0.1) for i in range(10)]
    assert step_seconds(slow, 2) > step_seconds(slow, 4) >= 10.9
