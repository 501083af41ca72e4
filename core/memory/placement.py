"""The plan of a run: which blocks stay on the device, how the others come, and what that takes in bytes and seconds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..host import MIN_RAM
from ..types import MemoryOptions
from .supply import NUM_STAGING, Source
from .timeline import Visit, step_seconds

GB = 10**9
NUM_SLOTS = 2  # of the ring: one computes while the other is filled
NUM_SLOTS_DISK = 3  # a disk is less even than RAM
# Bytes of VRAM left free: for what other programs take meanwhile, and for what the allocator can't use. The drivers of
# Windows serve a desktop too, and spill into RAM before anything fails.
HEADROOM, HEADROOM_WINDOWS = 512 << 20, 1 << 30
CUBLAS, CUBLAS_HOPPER = 8_519_680, 32 << 20  # bytes of VRAM that PyTorch gives cuBLAS for good; from Hopper on
RAM_RESERVE = 8 * GB  # that a Linux system with pinned weights should have left
PINNED_SHARE_WINDOWS = 0.5  # of all RAM; Windows refuses to pin more


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a run asks of a device.

    `blocks` are the bytes of each block's weights, `others` those of all other weights, which stay. `working` are the
    bytes beside them at the fullest moment, with the guidance passes one after the other; `working_interleaved` with
    all passes through a block before it is let go, None if that is not to be considered. `visit_seconds` is how long
    one pass through one block computes, None if unknown. `in_ram` are blocks that an earlier run left in RAM.
    """

    blocks: tuple[int, ...]
    others: int
    working: int
    working_interleaved: int | None = None
    passes: int
    visit_seconds: float | None = None
    in_ram: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is: bytes of VRAM and RAM that are free, and bytes a second of the way to the device and of the disk.

    `needs_pinning` is true of CUDA devices: only pinned memory crosses beside the compute. `libraries` are the bytes of
    VRAM that libraries take there at their first use, and keep.
    """

    vram: int
    ram: int
    total_ram: int
    link: float = 24.5e9  # measured of PCIe 4 x16 from pinned memory
    disk: float = 2.5e9  # of a common NVMe drive; what the system has cached comes several times as fast
    is_windows: bool = False
    needs_pinning: bool = True
    libraries: int = 0

    @property
    def headroom(self) -> int:
        """Bytes of VRAM to leave free where the user didn't say."""
        return headroom_of(self.is_windows)

    @property
    def pinnable(self) -> int:
        """Bytes of RAM that may be pinned."""
        limits = [self.ram - MIN_RAM, self.total_ram - RAM_RESERVE]
        if self.is_windows:
            limits.append(int(self.total_ram * PINNED_SHARE_WINDOWS))
        return max(0, min(limits)) if self.needs_pinning else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where a model's weights are during a run.

    The blocks `streaming` come and go through a ring of `num_slots` slots, each from its source; the others stay.
    `peak` is the most VRAM that weights and the `working` bytes of the computation take together, `spare` what that
    leaves beside the headroom, `pinned` the RAM that is pinned, staging included, `crossing` the bytes that cross to
    the device in a step. `step_seconds` is None where nothing is known of the speed; `compute_seconds` is the part of
    it in which the device computes.
    """

    streaming: tuple[int, ...] = ()
    num_slots: int = 0
    sources: Mapping[int, Source]
    interleaved: bool = False
    peak: int = 0
    spare: int = 0
    working: int = 0
    pinned: int = 0
    crossing: int = 0
    step_seconds: float | None = None
    compute_seconds: float | None = None
    notices: tuple[str, ...] = ()


def headroom_of(is_windows: bool) -> int:
    """Return the bytes of VRAM to leave free."""
    return HEADROOM_WINDOWS if is_windows else HEADROOM


def make_plan(job: Job, machine: Machine, options: MemoryOptions | None = None, at_least: int = 0) -> Plan:
    """Return the fastest plan that fits; of equally fast ones that with the least traffic.

    What `options` fixes is kept, but for that `at_least` so many blocks stream, of a card that proved too small. Raises
    ValueError if two blocks and the other weights don't fit, or for options that the model can't follow.
    """
    options = options or MemoryOptions()
    _check(job, options)
    ways = [False, True] if options.interleave is None else [options.interleave]
    if job.working_interleaved is None:
        ways = [False]
    # Three slots pay where a disk is read; where they don't fit, two do.
    slots = [options.slots] if options.slots else [NUM_SLOTS, NUM_SLOTS_DISK]
    plans = [
        _complete(job, machine, options, interleaved, num_slots, at_least)
        for interleaved, num_slots in product(ways, slots)
    ]
    return min(plans, key=_rank)


def wanted_bytes(job: Job, options: MemoryOptions, headroom: int, libraries: int = 0) -> int:
    """Return the VRAM that a run would like to have, to hold the whole model, or what it may have at most."""
    wanted = sum(job.blocks) + job.others + job.working + libraries
    wanted += headroom if options.headroom is None else options.headroom
    return wanted if options.vram is None else min(wanted, options.vram)


def _rank(plan: Plan) -> tuple[int, float, int, bool, int]:
    """Return what to compare plans by: first what they take of the headroom, then seconds, then traffic."""
    seconds = 0.0 if plan.step_seconds is None else round(plan.step_seconds, 4)
    return max(0, -plan.spare), seconds, plan.crossing, plan.interleaved, plan.num_slots


def _check(job: Job, options: MemoryOptions) -> None:
    total = len(job.blocks)
    if options.swapped is not None and not 0 <= options.swapped <= total:
        raise ValueError(
            f"Block Swap: {options.swapped} blocks are to be swapped, and the model has {total}: give 0 to {total}, or "
            "leave it to the plan."
        )


def _complete(
    job: Job, machine: Machine, options: MemoryOptions, interleaved: bool, num_slots: int, at_least: int
) -> Plan:
    alone = job.working + machine.libraries
    working = job.working_interleaved + machine.libraries if interleaved else alone
    headroom = machine.headroom if options.headroom is None else options.headroom
    vram = machine.vram if options.vram is None else min(machine.vram, options.vram)
    free = vram - headroom
    slot, total = max(job.blocks), len(job.blocks)
    num_slots = min(num_slots, total)
    ring, room = num_slots * slot, free - job.others - working
    if options.swapped is not None:
        num_streaming = options.swapped
    elif sum(job.blocks) <= room:
        num_streaming = 0
    else:
        num_streaming = min(total, total - max(0, room - ring) // slot)
    num_streaming = max(num_streaming, at_least)
    streaming = spread(total, num_streaming)
    if not num_streaming:
        interleaved, working = False, alone
    # A slot for each would save nothing.
    num_slots = min(num_slots, max(1, num_streaming - 1)) if num_streaming else 0
    staying = sum(size for i, size in enumerate(job.blocks) if i not in streaming)
    weights = job.others + staying + num_slots * slot
    if weights > vram and options.swapped is None:
        raise ValueError(
            f"{weights / GB:.1f} GB are needed for the least of this model's weights that must be on the card, and "
            f"{vram / GB:.1f} GB are free: use a smaller file of this model (fp8 takes half of bf16) or a smaller "
            "model, or close what else uses the card."
        )
    sources = _sources(job, machine, options, streaming)
    plan = Plan(
        streaming=streaming,
        num_slots=num_slots,
        sources=sources,
        interleaved=interleaved,
        peak=weights + working,
        spare=free - weights - working,
        working=working,
        pinned=_pinned(job, machine, sources),
    )
    return replace(_timed(job, machine, plan), notices=_notices(job, plan, options, vram))


def _sources(job: Job, machine: Machine, options: MemoryOptions, streaming: Sequence[int]) -> dict[int, Source]:
    """Return where each streaming block waits: as many as may be in RAM, spread evenly among those read from disk."""
    if options.source == Source.DISK.value or not machine.needs_pinning:
        # A device that is no card shares the RAM, so that keeping slabs there would take it twice.
        return dict.fromkeys(streaming, Source.DISK)
    slot = max(job.blocks)
    pinnable = machine.pinnable if options.pinned is None else min(options.pinned, machine.pinnable)
    ram = max(0, machine.ram - MIN_RAM)
    pinnable, ram = (max(0, bytes_ - NUM_STAGING * slot) for bytes_ in (pinnable, ram))  # staging is pinned too
    num_pinned = 0 if options.source == Source.STAGED.value else min(len(streaming), pinnable // slot)
    num_staged = min(len(streaming) - num_pinned, max(0, ram - num_pinned * slot) // slot)
    if options.source == Source.PINNED.value or (options.source is None and not machine.is_windows):
        num_staged = 0  # RAM that a system should not pin is better left to its cache of the file
    kept = _kept(streaming, job.in_ram, num_pinned + num_staged)
    pinned = {kept[k] for k in spread(len(kept), num_pinned)}
    return {
        block: Source.PINNED if block in pinned else Source.STAGED if block in kept else Source.DISK
        for block in streaming
    }


def _kept(streaming: Sequence[int], in_ram: Collection[int], count: int) -> list[int]:
    """Return which blocks to keep in RAM: those that are there already, and others as evenly as can be."""
    there = [block for block in streaming if block in in_ram][:count]
    others = [block for block in streaming if block not in there]
    return sorted([*there, *(others[k] for k in spread(len(others), count - len(there)))])


def _pinned(job: Job, machine: Machine, sources: Mapping[int, Source]) -> int:
    if not machine.needs_pinning:
        return 0
    masters = sum(job.blocks[i] for i, source in sources.items() if source is Source.PINNED)
    return masters + NUM_STAGING * max(job.blocks)


def _notices(job: Job, plan: Plan, options: MemoryOptions, vram: int) -> tuple[str, ...]:
    """Return what the user should know."""
    if plan.peak <= vram:
        return ()
    asked = f"{vram / GB:.1f} GB are free, and about {plan.peak / GB:.1f} are needed"
    if options.swapped is not None and len(plan.streaming) < len(job.blocks):
        return (f"Block Swap: {asked} with {options.swapped} blocks swapped: swap more, or leave it to the plan.",)
    return (
        f"{asked} for this size even with {len(plan.streaming)} of {len(job.blocks)} blocks streamed in: it may run out"
        " of memory. Choose a smaller size, or close what else uses the card.",
    )


def _timed(job: Job, machine: Machine, plan: Plan) -> Plan:
    walks = 1 if plan.interleaved or job.passes == 1 else job.passes
    crossing = walks * sum(job.blocks[i] for i in plan.streaming) if len(plan.streaming) > plan.num_slots else 0
    plan = replace(plan, crossing=crossing)
    if job.visit_seconds is None:
        return plan
    visits, walks = visits_of(job, machine, plan)
    return replace(
        plan,
        step_seconds=walks * step_seconds(visits, plan.num_slots),
        compute_seconds=job.passes * job.visit_seconds * len(job.blocks),
    )


def visits_of(job: Job, machine: Machine, plan: Plan) -> tuple[list[Visit], int]:
    """Return one walk over the blocks as a timeline, and how many walks a step takes. `visit_seconds` must be known."""
    together = job.passes if plan.interleaved else 1
    visits = [
        Visit(
            seconds=job.visit_seconds * together,
            streams=i in plan.sources,
            coming=_coming(job, machine, plan, i) if i in plan.sources else 0.0,
        )
        for i in range(len(job.blocks))
    ]
    return visits, job.passes // together


def _coming(job: Job, machine: Machine, plan: Plan, block: int) -> float:
    """Return the seconds in which a block's slab comes: over the link, or from a disk that is slower than that."""
    speed = min(machine.link, machine.disk) if plan.sources.get(block) is Source.DISK else machine.link
    return job.blocks[block] / speed


def spread(total: int, chosen: int) -> tuple[int, ...]:
    """Return `chosen` of `total` indices, as evenly apart as can be, the end and the beginning being joined.

    So each streaming block has the time of as many others as possible to come in.
    """
    return tuple((2 * i + 1) * total // (2 * chosen) for i in range(chosen))
