"""Plans by hand: what stays, what streams, from where, and which of two ways is the faster."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from wanqwen.core.host import MIN_RAM
from wanqwen.core.memory.placement import (
    CUBLAS,
    GB,
    HEADROOM,
    HEADROOM_WINDOWS,
    RAM_RESERVE,
    Job,
    Machine,
    make_plan,
    spread,
    wanted_bytes,
)
from wanqwen.core.memory.report import describe
from wanqwen.core.memory.supply import NUM_STAGING, Source
from wanqwen.core.types import MemoryOptions

BLOCK = GB // 2
JOB = Job(blocks=(BLOCK,) * 40, others=GB, working=2 * GB, working_interleaved=5 * GB // 2, passes=2, visit_seconds=0.1)
LARGE = Machine(vram=100 * GB, ram=100 * GB, total_ram=120 * GB, link=25e9, disk=2.5e9)


def test_all_stays_where_all_fits() -> None:
    whole = 20 * GB + GB + 2 * GB + HEADROOM
    plan = make_plan(JOB, replace(LARGE, vram=whole))
    assert plan.streaming == () and not plan.interleaved and plan.peak == whole - HEADROOM
    assert plan.crossing == 0 and plan.step_seconds == pytest.approx(40 * 2 * 0.1)
    assert make_plan(JOB, replace(LARGE, vram=whole - 1)).streaming
    assert wanted_bytes(JOB, MemoryOptions(), HEADROOM) == whole
    assert wanted_bytes(JOB, MemoryOptions(vram=GB), HEADROOM) == GB
    assert wanted_bytes(JOB, MemoryOptions(headroom=0), HEADROOM) == whole - HEADROOM


def test_what_libraries_keep_is_asked_for_too() -> None:
    wanted = wanted_bytes(JOB, MemoryOptions(), HEADROOM, CUBLAS)
    machine = replace(LARGE, vram=wanted, libraries=CUBLAS)
    plan = make_plan(JOB, machine)
    assert not plan.streaming and plan.peak + HEADROOM == wanted
    assert make_plan(JOB, replace(machine, vram=wanted - 1)).streaming


def test_as_much_stays_as_fits_beside_the_ring() -> None:
    for vram in range(5 * GB, 23 * GB, 370_000_000):
        plan = make_plan(JOB, replace(LARGE, vram=vram), MemoryOptions(interleave=False))
        staying = 40 - len(plan.streaming)
        assert plan.peak == GB + 2 * GB + (staying + plan.num_slots) * BLOCK
        assert plan.peak + HEADROOM <= vram < plan.peak + HEADROOM + BLOCK
        assert not plan.notices


def test_too_little_for_two_blocks_is_an_error_and_for_the_work_a_warning() -> None:
    with pytest.raises(ValueError, match=r"2\.0 GB are needed for the least .* and 1\.9 GB are free: use a smaller"):
        make_plan(JOB, replace(LARGE, vram=19 * GB // 10))
    [notice] = make_plan(JOB, replace(LARGE, vram=3 * GB)).notices
    assert notice.startswith("3.0 GB are free, and about 4.0 are needed for this size even with 40 of 40 blocks")


def test_passes_are_interleaved_where_that_hides_transfers_or_halves_them() -> None:
    machine = replace(LARGE, vram=12 * GB)
    slow = make_plan(replace(JOB, visit_seconds=0.001), machine)
    assert (
        slow.interleaved
        and slow.step_seconds
        < make_plan(replace(JOB, visit_seconds=0.001), machine, MemoryOptions(interleave=False)).step_seconds
    )
    hidden = make_plan(replace(JOB, visit_seconds=10.0), machine)
    apart = make_plan(replace(JOB, visit_seconds=10.0), machine, MemoryOptions(interleave=False))
    assert hidden.interleaved and hidden.step_seconds == pytest.approx(apart.step_seconds)
    assert hidden.crossing < 0.6 * apart.crossing
    unknown = make_plan(replace(JOB, visit_seconds=None), machine)
    assert unknown.interleaved and unknown.step_seconds is None
    assert not make_plan(replace(JOB, passes=1, working_interleaved=None), machine).interleaved
    # Where the second stream's memory would take the least that a run needs, it is left out.
    tight = make_plan(JOB, replace(LARGE, vram=GB + 2 * GB + 2 * BLOCK + HEADROOM))
    assert not tight.interleaved and not tight.notices


def test_ram_decides_the_sources() -> None:
    machine = replace(LARGE, vram=6 * GB, total_ram=64 * GB, ram=60 * GB)
    plan = make_plan(JOB, machine)
    assert set(plan.sources.values()) == {Source.PINNED} and plan.pinned == (len(plan.streaming) + NUM_STAGING) * BLOCK
    for ram in (12 * GB, 20 * GB):
        plan = make_plan(JOB, replace(machine, ram=ram, total_ram=ram + 2 * GB))
        count = sum(source is Source.PINNED for source in plan.sources.values())
        assert 0 < count < len(plan.streaming) and Source.DISK in plan.sources.values()
        limit = min(ram - MIN_RAM, ram + 2 * GB - RAM_RESERVE)
        assert limit - BLOCK < plan.pinned <= limit
        # Those that have to be read are as far apart as can be.
        disk = [k for k, block in enumerate(plan.streaming) if plan.sources[block] is Source.DISK]
        gaps = [b - a for a, b in pairwise(disk)]
        assert max(gaps, default=1) <= min(gaps, default=1) + 1
    windows = make_plan(JOB, replace(machine, is_windows=True, ram=30 * GB, total_ram=32 * GB))
    assert sum(s is Source.PINNED for s in windows.sources.values()) * BLOCK <= 16 * GB
    assert Source.STAGED in windows.sources.values() and windows.peak <= 6 * GB - HEADROOM_WINDOWS
    none = make_plan(JOB, replace(machine, ram=GB))
    assert set(none.sources.values()) == {Source.DISK}
    mps = make_plan(JOB, replace(machine, needs_pinning=False))
    assert Source.PINNED not in mps.sources.values() and mps.pinned == 0


def test_what_is_fixed_is_kept() -> None:
    machine = replace(LARGE, vram=12 * GB)
    options = MemoryOptions(swapped=30, slots=3, source="disk", interleave=False, headroom=0, vram=11 * GB)
    plan = make_plan(JOB, machine, options)
    assert (len(plan.streaming), plan.num_slots, plan.interleaved) == (30, 3, False)
    assert set(plan.sources.values()) == {Source.DISK}
    # By hand all may stay, too: the notice says what that means.
    plan = make_plan(JOB, machine, MemoryOptions(swapped=0))
    assert plan.streaming == () and plan.notices[0].endswith("0 blocks swapped: swap more, or leave it to the plan.")
    less = make_plan(JOB, machine, MemoryOptions(vram=8 * GB))
    assert less.peak <= 8 * GB - HEADROOM < make_plan(JOB, machine).peak
    few = make_plan(JOB, machine, MemoryOptions(pinned=3 * GB))
    assert sum(s is Source.PINNED for s in few.sources.values()) == (3 * GB - NUM_STAGING * BLOCK) // BLOCK
    with pytest.raises(ValueError, match=r"41 blocks are to be swapped, and the model has 40: give 0 to 40, or leave"):
        make_plan(JOB, machine, MemoryOptions(swapped=41))
    with pytest.raises(ValueError, match="source is 'tape': choose pinned, staged, disk, or auto"):
        MemoryOptions(source="tape")
    with pytest.raises(ValueError, match="0 slots: give 1 or more"):
        MemoryOptions(slots=0)


def test_streaming_blocks_are_spread_evenly() -> None:
    for total in (1, 2, 7, 40, 60):
        for chosen in range(1, total + 1):
            indices = spread(total, chosen)
            gaps = [b - a for a, b in pairwise((*indices, indices[0] + total))]
            assert len(set(indices)) == chosen and all(0 <= i < total for i in indices)
            assert max(gaps) <= min(gaps) + 1
    assert spread(40, 0) == ()


def test_random_plans_keep_their_promises() -> None:
    rng = random.Random(0)
    for _ in range(300):
        count = rng.randint(2, 60)
        job = Job(
            blocks=tuple(rng.randint(BLOCK // 2, BLOCK) for _ in range(count)),
            others=rng.randint(0, GB),
            working=rng.randint(0, 3 * GB),
            working_interleaved=rng.choice([None, 4 * GB]),
            passes=2,
            visit_seconds=rng.choice([None, 0.001, 0.1]),
        )
        least = job.others + job.working + 3 * BLOCK + HEADROOM
        machine = replace(LARGE, vram=rng.randint(least, 40 * GB), ram=rng.randint(0, 60 * GB))
        plan = make_plan(job, machine)
        assert plan.peak + HEADROOM <= machine.vram and not plan.notices
        assert set(plan.sources) == set(plan.streaming) and plan.num_slots <= max(0, len(plan.streaming))
        if plan.streaming:
            assert plan.num_slots < len(plan.streaming) and plan.crossing > 0


def test_plans_are_said_in_words() -> None:
    lines = describe(make_plan(JOB, replace(LARGE, vram=12 * GB)), 40)
    assert lines[0].startswith(
        "13 of 40 blocks stay on the device, 27 stream through 2 slots: 27 from pinned RAM; both"
    )
    assert lines[1].startswith("VRAM at most ") and "2.50 of it for the computation; pinned RAM 14.5 GB" in lines[1]
    assert lines[2] == "13.5 GB cross to the card in each step, hidden behind the computation; about 8.00 s a step"
    assert describe(make_plan(JOB, LARGE), 40)[0] == "40 of 40 blocks stay on the device"
    slow = describe(make_plan(replace(JOB, visit_seconds=0.001), replace(LARGE, vram=12 * GB)), 40)[2]
    assert "% slower than without streaming" in slow
