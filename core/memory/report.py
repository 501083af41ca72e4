"""A plan in words, for people."""

from collections import Counter

from .placement import GB, Plan
from .supply import Source

PLACES = {Source.PINNED: "pinned RAM", Source.STAGED: "RAM", Source.DISK: "disk"}


def describe(plan: Plan, num_blocks: int) -> list[str]:
    """Return lines that say where the blocks are, what that takes of the card and of RAM, and how long a step takes."""
    lines = [where(plan, num_blocks)]
    memory = f"VRAM at most {plan.peak / GB:.2f} GB, {plan.working / GB:.2f} of it for the computation"
    if plan.pinned:
        memory += f"; pinned RAM {plan.pinned / GB:.1f} GB"
    lines.append(memory)
    if plan.crossing:
        lines.append(f"{plan.crossing / GB:.1f} GB cross to the card in each step{_time(plan)}")
    elif plan.step_seconds is not None:
        lines.append(f"about {plan.step_seconds:.2f} s a step")
    return [*lines, *plan.notices]


def where(plan: Plan, num_blocks: int) -> str:
    """Say where the blocks are."""
    away = len(plan.streaming)
    line = f"{num_blocks - away} of {num_blocks} blocks stay on the device"
    if not away:
        return line
    counts = Counter(plan.sources.values())
    places = [f"{counts[source]} from {place}" for source, place in PLACES.items() if counts[source]]
    line += f", {away} stream through {plan.num_slots} slots: {', '.join(places)}"
    return line + "; both guidance passes go through each block together" * plan.interleaved


def _time(plan: Plan) -> str:
    if plan.step_seconds is None or not plan.compute_seconds:
        return ""
    waiting = plan.step_seconds / plan.compute_seconds - 1
    hidden = "hidden behind the computation" if waiting < 0.005 else f"{waiting:.0%} slower than without streaming"
    return f", {hidden}; about {plan.step_seconds:.2f} s a step"
