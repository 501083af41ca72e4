"""Which blocks stay on the device and which stream through it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

NUM_SLOTS = 2  # of the ring: one computes while the other is filled
HEADROOM = 512 << 20  # bytes left free: for what other programs take meanwhile, and for what the allocator can't use


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """`streaming` are the indices of the blocks that come and go through a ring of `num_slots` slots."""

    streaming: tuple[int, ...] = ()
    num_slots: int = 0


def place(blocks: Sequence[int], others: int, working: int, free: int) -> Placement:
    """Return how weights are laid out in `free` bytes of a device.

    `blocks` are the bytes of each block's weights, `others` those of all other weights, which stay. As many blocks stay
    as leave room for `working` bytes; the ones that stream are spread evenly among them, so that each has the time of
    as many others as possible to come in. Raises ValueError if two blocks and the other weights don't fit.
    """
    if sum(blocks) + others + working + HEADROOM <= free:
        return Placement()
    slot = max(blocks)
    ring = min(NUM_SLOTS, len(blocks)) * slot
    if others + ring > free:
        raise ValueError(
            f"{(others + ring) / 1e9:.1f} GB are needed for the least of this model's weights that must be on the "
            f"card, and {free / 1e9:.1f} GB are free: use a smaller file of this model (fp8 takes half of bf16) or a "
            "smaller model, or close what else uses the card."
        )
    room = free - others - ring - working - HEADROOM
    if room < 0:
        log.warning(
            "%.1f GB are free, and about %.1f are needed for this size even with all blocks streamed in: it may run out"
            " of memory. Choose a smaller size, or close what else uses the card.",
            free / 1e9, (others + ring + working) / 1e9,
        )  # fmt: skip
    num_streaming = len(blocks) - max(0, room) // slot
    return Placement(streaming=spread(len(blocks), num_streaming), num_slots=ring // slot)


def spread(total: int, chosen: int) -> tuple[int, ...]:
    """Return `chosen` of `total` indices, far from each other; fewer of them are always among more.

    Each comes into the middle of the largest gap that the ones before it left, the end and the beginning being joined.
    """
    picked = [total // 2][:chosen]
    while len(picked) < chosen:
        following = (*picked[1:], picked[0] + total)
        size, start = max((after - before, before) for before, after in zip(picked, following, strict=True))
        picked = sorted([*picked, (start + size // 2) % total])
    return tuple(picked)
