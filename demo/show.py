"""Run both miniatures on prompts they have never seen, and say how well they did."""

from pathlib import Path

from .cards import show as cards
from .clips import show as clips


def run(count: int, seed: int, out: Path, *, blind: bool = False) -> str:
    """Make `count` clips, pictures and edits, write videos and contact sheets to `out`, and return the scores as text.

    All follows from `seed`. `blind` zeroes the text, to show that it is the text that steers.
    """
    return "\n".join(part.run(count, seed, out, blind=blind) for part in (clips, cards))
