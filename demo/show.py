"""Run both miniatures on prompts they have never seen, and say how well they did."""

from collections.abc import Iterator
from pathlib import Path

from .cards import show as cards
from .clips import show as clips
from .clips import show_pictures as clips_from_pictures


def run(count: int, seed: int, out: Path, *, blind: bool = False) -> Iterator[str]:
    """Make `count` clips from text, as many from a picture and from two, then pictures and edits.

    Videos and contact sheets go to `out`, scores are given as text.

    All follows from `seed`. `blind` zeroes the text, to show that it is the text that steers.
    """
    for part in (clips, clips_from_pictures, cards):
        yield part.run(count, seed, out, blind=blind)
