"""The ring as a timeline of events: when each block's slab comes, and when each block computes."""

from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP, MEASURED = 3, 4  # steps: the first ones begin with an empty ring


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """One block of a walk: how many seconds it computes, whether it streams, and in how many seconds its slab comes."""

    seconds: float
    streams: bool = False
    coming: float = 0.0


def step_seconds(visits: Sequence[Visit], num_slots: int) -> float:
    """Return the seconds of one walk over the blocks, in the rhythm that the ring settles in.

    One link brings one slab at a time, in the order in which blocks are used; a slot is free for the next slab when the
    compute has left it. Blocks that stay, and a ring that holds all that streams, wait for nothing.
    """
    streaming = [i for i, visit in enumerate(visits) if visit.streams]
    if len(streaming) <= num_slots:
        return sum(visit.seconds for visit in visits)
    left: list[float] = []  # when the compute left the n-th slab
    arrived: list[float] = []  # when the n-th slab was there
    now, ends = 0.0, []
    for _ in range(WARM_UP + MEASURED):
        for visit in visits:
            if visit.streams:
                n = len(arrived)
                link_free = arrived[-1] if arrived else 0.0
                slot_free = left[n - num_slots] if n >= num_slots else 0.0
                arrived.append(max(link_free, slot_free) + visit.coming)
                now = max(now, arrived[-1])
            now += visit.seconds
            if visit.streams:
                left.append(now)
        ends.append(now)
    return (ends[-1] - ends[WARM_UP - 1]) / MEASURED
