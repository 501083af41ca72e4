"""Bytes of a file to where they are wanted, in few large reads and without a copy between."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

PIECE = 64 << 20  # bytes read at once: large enough for full speed, small enough to stop between two
MAX_PARTS = 512  # of one scattered read; Linux and macOS take 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The bytes of one tensor in a file, and where they go: a contiguous CPU tensor of as many bytes."""

    file: Path
    start: int
    name: str
    out: Tensor


def read_ranges(ranges: Iterable[Range], go_on: Callable[[], None] = lambda: None) -> None:
    """Read each range into its tensor; neighbours in a file are read together. `go_on` is asked between two reads.

    No file stays open. Raises ValueError for a file that ends too early, OSError for one that can't be read.
    """
    by_file: dict[Path, list[Range]] = {}
    for one in ranges:
        by_file.setdefault(one.file, []).append(one)
    for file, inside in by_file.items():
        with open(file, "rb", buffering=0) as opened:
            for neighbours in _neighbours(sorted(inside, key=lambda one: one.start)):
                _read(opened, neighbours, go_on)


def _neighbours(ranges: Sequence[Range]) -> Iterable[list[Range]]:
    """Divide ranges in the order of the file into those that follow one another without a gap."""
    group: list[Range] = []
    for one in ranges:
        if group and group[-1].start + group[-1].out.nbytes != one.start:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _read(opened: FileIO, neighbours: list[Range], go_on: Callable[[], None]) -> None:
    at = neighbours[0].start
    left = [(one, memoryview(_bytes(one.out).numpy())) for one in neighbours if one.out.nbytes]
    while left:
        go_on()
        views, room = [], PIECE
        for _, view in islice(left, MAX_PARTS):
            views.append(view[:room])
            room -= len(views[-1])
            if not room:
                break
        count = _read_once(opened, views, at)
        if not count:
            one = left[0][0]
            raise ValueError(
                f"{one.file} ends at byte {at}, in the middle of {one.name}: it was cut off since it was opened. "
                "Download it again."
            )
        at += count
        while left and count >= len(left[0][1]):
            count -= len(left.pop(0)[1])
        if left:
            left[0] = (left[0][0], left[0][1][count:])


def _read_once(opened: FileIO, views: list[memoryview], at: int) -> int:
    """Read from a place in the file into memory that follows one after the other; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(opened.fileno(), views, at)
    opened.seek(at)  # Windows has no scattered reads
    return opened.readinto(views[0])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
